"""What clients talk to. HTTP and gRPC build the same validated request and run the same service.

openai.py        shape and types of request bodies (schema_errors.py: their faults in one line)
checks.py        what values may be                  conversation.py  what messages may be
request.py       a checked body becomes the GenerateRequest that both fronts run
service.py       InferenceService: checks, admission, tokenisation, submission
prompts.py       texts and conversations to token ids
generation.py    one running request: engine outputs become Deltas; closing it aborts
replay.py        its sequences at the engine; one whose worker is lost goes on on another
idempotency.py   requests that may be sent twice
choice.py        one choice of it: text, stop strings, log probabilities
admission.py     how many sequences may be open      ledger.py  what was asked and emitted so far
backend.py       the engine as the service sees it
responses.py     Deltas to OpenAI objects            streaming.py  and to server-sent events
http_server.py   routes (http_generation.py: those that generate; http_guard.py: request ids,
                 header bounds, last-resort errors; json_body.py: bytes to JSON,
                 guarded; api_docs.py: bodies in /openapi.json)
observation.py   one request as observers hear of it (observer.py)
request_context.py  the request that a task works for: its id, the name of its key
web.py           the pages / and /experts: static files with their headers
operations.py    commands that change the cluster
expert_load.py   rows, replicas and holders of every expert: read or watched
grpc_server.py   methods (grpc_messages.py: messages to bodies; grpc_errors.py: statuses)

A choice is one answer (n of them a prompt); a sequence is one choice as the engine sees it.
"""
