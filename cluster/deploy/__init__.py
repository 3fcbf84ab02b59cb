"""Shoal on Kubernetes: one `deploy.yaml` becomes a RayService and what it needs around it.

config.py      DeployConfig: what can be asked for; presets/ are filled-in ones
sizes.py       memory of a model's parts; hardware.py  what GPUs have; sizing.py  both together
render.py      DeployConfig -> manifests, pure; manifests/ holds the parts
tree.py        presets -> the Kustomize tree k8s/
secrets.py     which Secrets a deployment needs
"""
