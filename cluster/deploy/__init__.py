"""Shoal on Kubernetes: one `deploy.yaml` becomes a RayService and what it needs around it.

config.py sections.py   what can be asked for; presets/ are filled-in ones
sizes.py hardware.py    memory of a model's parts, GPUs;  sizing.py  both together
render.py               DeployConfig -> manifests, pure; manifests/ holds the parts, one a concern
tree.py                 presets -> the Kustomize tree k8s/
secrets.py              which Secrets a deployment needs
check/                  mistakes in manifests, found offline
api.py                  the API server;  apply.py differ.py scale.py down.py  changes to it
follow.py verdict.py    what becomes of a deployment, and why; history.py what was seen before
logs.py forward.py      its pods
plan.py                 what GPUs can serve of a model, at most, from layout.py token_costs.py
                        step_time.py;  plan_cli.py plan_table.py plan_report.py  how it is shown
cli.py *_cli.py         the commands
"""
