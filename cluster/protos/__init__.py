"""Protocol buffers of the gRPC API and the code generated from them (`make protos`).

shoal/v1/inference.proto is the source; the modules beside it are generated: do not edit.
"""
