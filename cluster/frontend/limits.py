"""Every bound on what a client may send or hold, in one table; `GET /v1/limits` prints it.

Both fronts read these numbers; what the checks look like is in json_body.py and request.py.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Limits:
    """Defaults fit a laptop and a cluster alike; the model's own bounds (context) come on top."""

    # The envelope
    max_body_bytes: int = 4 * 2**20
    max_json_depth: int = 64
    max_header_bytes: int = 64 * 2**10
    max_headers: int = 100
    max_request_id_chars: int = 128
    max_body_s: float = 30.0
    """Time to send the body in."""

    # How much work one request may be
    max_choices: int = 128
    """n."""
    max_prompts: int = 256
    max_sequences: int = 256
    """prompts x n."""
    max_messages: int = 2048
    max_content_parts: int = 256
    max_name_chars: int = 64
    max_render_s: float = 2.0
    """Time of the chat template."""
    max_timeout_s: float = 86_400.0

    # Sampling
    max_stop_strings: int = 4
    max_stop_chars: int = 256
    max_stop_token_ids: int = 128
    max_allowed_token_ids: int = 1024
    max_logit_bias: int = 1024
    max_abs_logit_bias: float = 100.0
    max_top_logprobs: int = 20

    # Labels
    max_user_chars: int = 512
    max_metadata_entries: int = 16
    max_metadata_key_chars: int = 64
    max_metadata_value_chars: int = 512
    max_cache_salt_chars: int = 128

    # Idempotency keys, of one ingress
    max_idempotency_key_chars: int = 255
    idempotency_ttl_s: float = 600.0
    max_idempotency_keys: int = 4096
    max_kept_answer_bytes: int = 256 * 2**10
    """A larger answer is computed again."""
    max_kept_answers_bytes: int = 32 * 2**20
    """Of all keys together; the oldest are forgotten first."""

    # The server
    max_open_sequences: int = 1024
    """Sequences that wait or run, all clients together; more are refused at once."""
    first_output_wait_s: float = 10.0
    """A stream whose first token takes longer than this is opened without it."""
    ping_interval_s: float = 15.0
    """A silent stream carries a comment this often, so that no proxy closes it."""
    slow_client_s: float = 60.0
    """A stream whose client takes nothing for this long is aborted."""

    def as_dict(self) -> dict[str, int | float]:
        """All limits by name."""
        return asdict(self)
