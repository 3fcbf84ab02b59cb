"""Our errors as gRPC statuses, with google.rpc details in the trailing metadata."""

from __future__ import annotations

from typing import Any, Protocol

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2 as details
from google.rpc import status_pb2

from cluster.errors import InvalidRequest, NotFound, ShoalError, kind_of
from cluster.protos import inference_pb2 as pb

DOMAIN = "shoal"
REQUEST_ID_KEY = "x-request-id"
DETAILS_KEY = "grpc-status-details-bin"
_SAMPLING_FIELDS = frozenset(pb.SamplingParams.DESCRIPTOR.fields_by_name)
Metadata = list[tuple[str, str | bytes]]


class GrpcContext(Protocol):
    """The part of a call that grpc.aio.ServicerContext and Ray Serve's stand-in share."""

    def invocation_metadata(self) -> Any: ...
    def set_code(self, code: Any) -> None: ...
    def set_details(self, details: str) -> None: ...
    def set_trailing_metadata(self, trailing_metadata: Any) -> None: ...


def set_error(context: GrpcContext, error: ShoalError, request_id: str) -> pb.Error:
    """Make the call end with the error's status. Returns the error as a message for streams."""
    kind = kind_of(error)
    code = getattr(grpc.StatusCode, kind.grpc_code)
    status = status_pb2.Status(code=code.value[0], message=error.message)
    for detail in _details(error):
        status.details.add().Pack(detail)
    context.set_code(code)
    context.set_details(error.message)
    metadata: Metadata = [(REQUEST_ID_KEY, request_id), (DETAILS_KEY, status.SerializeToString())]
    context.set_trailing_metadata(metadata)
    return pb.Error(
        message=error.message, type=kind.openai_type, param=error.param or "", code=error.code
    )


def _details(error: ShoalError) -> list[Any]:
    found: list[Any] = [details.ErrorInfo(reason=error.code.upper(), domain=DOMAIN)]
    if isinstance(error, InvalidRequest) and error.param:
        violation = details.BadRequest.FieldViolation(
            field=_field_path(error.param), description=error.message
        )
        found.append(details.BadRequest(field_violations=[violation]))
    if isinstance(error, NotFound):
        found.append(details.ResourceInfo(resource_type=error.param or "", owner=DOMAIN))
    if error.retry_after_s is not None:
        found.append(details.RetryInfo(retry_delay=Duration(seconds=error.retry_after_s)))
    return found


def _field_path(param: str) -> str:
    """Sampling fields lie one level deeper in the messages than in the JSON bodies."""
    first = param.split(".")[0].split("[")[0]
    return f"sampling.{param}" if first in _SAMPLING_FIELDS else param
