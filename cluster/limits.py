"""Every bound on what a client may send or hold, in one table; `GET /v1/limits` prints it.

Both fronts read these numbers; the checks are in frontend/json_body.py and checks.py.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from attention.messages import MAX_LOGPROBS

MAX_GRPC_MESSAGE_BYTES = 16 * 2**20

Few = Annotated[int, Field(ge=1, le=1024)]
Many = Annotated[int, Field(ge=1, le=1 << 20)]
Chars = Annotated[int, Field(ge=1, le=1 << 16)]
Ids = Annotated[int, Field(ge=1, le=1 << 17)]
LabelChars = Annotated[int, Field(ge=1, le=128)]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]


class Limits(BaseModel):
    """Defaults fit a laptop and a cluster alike; the model's own bounds (context) come on top."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # The envelope
    max_body_bytes: Annotated[int, Field(ge=1, le=MAX_GRPC_MESSAGE_BYTES)] = 4 * 2**20
    max_json_depth: Annotated[int, Field(ge=8, le=256)] = 64
    max_header_bytes: Annotated[int, Field(ge=1024, le=64 * 2**10)] = 64 * 2**10
    max_headers: Annotated[int, Field(ge=16, le=1024)] = 100
    max_request_id_chars: LabelChars = 128
    max_body_s: Seconds = 30.0
    """Time to send the body in."""

    # How much work one request may be
    max_choices: Few = 128
    """n."""
    max_prompts: Few = 256
    max_sequences: Few = 256
    """prompts x n."""
    max_messages: Many = 2048
    max_content_parts: Many = 256
    max_name_chars: Chars = 64
    max_render_s: Seconds = 2.0
    """Time of the chat template."""
    max_timeout_s: Seconds = 86_400.0

    # Sampling
    max_stop_strings: Few = 4
    max_stop_chars: Chars = 256
    max_stop_token_ids: Ids = 128
    max_allowed_token_ids: Ids = 1024
    max_logit_bias: Ids = 1024
    max_abs_logit_bias: Annotated[float, Field(gt=0, le=1e6)] = 100.0
    max_top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] = 20

    # Labels
    max_user_chars: Chars = 512
    max_metadata_entries: Few = 16
    max_metadata_key_chars: Chars = 64
    max_metadata_value_chars: Chars = 512
    max_cache_salt_chars: LabelChars = 128

    # Idempotency keys, of one ingress
    max_idempotency_key_chars: Chars = 255
    idempotency_ttl_s: Seconds = 600.0
    max_idempotency_keys: Many = 4096
    max_kept_answer_bytes: Annotated[int, Field(ge=0, le=1 << 30)] = 256 * 2**10
    """A larger answer is computed again."""
    max_kept_answers_bytes: Annotated[int, Field(ge=0, le=1 << 36)] = 32 * 2**20
    """Of all keys together; the oldest are forgotten first."""

    # The server
    max_open_sequences: Many = 1024
    """Sequences that wait or run, all clients of one ingress together; more are refused at once."""
    first_output_wait_s: Seconds = 10.0
    """A stream whose first token takes longer than this is opened without it."""
    ping_interval_s: Seconds = 15.0
    """A silent stream carries a comment this often, so that no proxy closes it."""
    slow_client_s: Seconds = 60.0
    """A stream whose client takes nothing for this long is aborted."""
