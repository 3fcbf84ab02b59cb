"""The offline check of manifests: what a server, the operator or the running cluster would refuse.

checks.py            all of it: `check_manifests`
finding.py           one mistake: where it is, what is wrong, what to do
source.py            YAML files to objects that know their file and lines; yaml_nodes.py below it
node.py              a place in an object; asking a missing one never raises
schemas.py           built-in kinds against the schemas of a Kubernetes version
rayservice_model.py  the fields of KubeRay that we know, serve_model.py those of Ray Serve;
                     typed.py says what does not fit
operator_rules.py    what KubeRay's controller refuses
pod_rules.py         what an API server refuses in a pod; syntax.py names, labels, quantities
application.py       serveConfigV2: our settings, import paths
placement.py         deployments against groups of pods (ray_cluster.py): labels, GPUs, memory
ray_pods.py          our demands on the RayService and its pods
references.py        objects that name or select each other (selectors.py)
network_rules.py     NetworkPolicies
"""
