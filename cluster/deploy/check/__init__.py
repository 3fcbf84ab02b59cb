"""The offline check of manifests: what a server, the operator or the running cluster would refuse.

finding.py           one mistake: where it is, what is wrong, what to do
source.py            YAML files to objects that know their file and lines
node.py              a place in an object; asking a missing one never raises
schemas.py           built-in kinds against the schemas of a Kubernetes version
rayservice_model.py  the RayService fields that we know; typed.py tells what does not fit
operator_rules.py    what KubeRay's controller refuses
pod_rules.py         what an API server refuses in a pod
application.py       serveConfigV2: our settings, ports, import paths
placement.py         deployments against worker groups: labels, GPUs, memory
ray_pods.py          our demands on the pods of a RayService
references.py        objects that name or select each other
checks.py            all of it: `check_manifests`
"""
