"""The top of the stack: front ends, tokenizer, configuration and the composition with Ray.

config.py        settings of a whole application
limits.py        every bound on what a client may send or hold
errors.py        every error a client can see and its HTTP status, gRPC code and OpenAI type
tokenizer.py     text to token ids and back; chat_template.py renders conversations
frontend/        the OpenAI HTTP API and the gRPC API over one InferenceService
protos/          shoal.v1 and the code generated from it
generation_defaults.py  the sampling that a checkpoint recommends
machine_code.py  compiles the CPU kernels once, before the workers look for them
autoscaling/     how many workers a tier should have
chaos.py         a worker kills or stops itself when told to, for tests
serve_targets.py what Serve's autoscaler wants, for those who watch
site.py          where a member runs; members.py, placement.py, ingress.py: the members
inline.py        all of them in one process
app.py           binds the plain worker classes to Ray Serve; the only such file
cli.py           the `shoal` command (session.py: what it runs; launcher.py: Ray and Serve)
deploy/          Kubernetes: manifests, checks, `shoal k8s`, `shoal plan`
observability/   metrics, logs, views
"""
