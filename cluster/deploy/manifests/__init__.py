"""The parts of a deployment's manifests, one file a concern; render.py puts them together.

names.py         what objects, labels, ports and keys are called
serve_config.py  serveConfigV2: the application and its settings
rayservice.py    the RayService: head, autoscaler, a worker group a tier
pods.py          pod templates;  volumes.py  what is mounted
access.py        Namespace, service accounts, the deployer's Role
disruption.py    PriorityClasses, PodDisruptionBudgets
storage.py       the claim that holds the model
network.py       gateway.py  redis.py  what a cluster may have besides, as has
monitoring.py    whom Prometheus scrapes;  *alerts.py  when it calls;  boards.py  what Grafana shows
promql.py        queries of both;  board_*.py  their panels;  grafana.py  panels -> JSON
"""
