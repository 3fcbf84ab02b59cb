"""The architecture of a model, as its `config.json` and `generation_config.json` state it.

Two generations of field names are read (`rope_scaling` + `rope_theta` and `rope_parameters`,
`torch_dtype` and `dtype`, ...).  What this system does not compute is refused here, by the field's
name and with the values that are supported, so that a later part never guesses.  Imports no torch:
`--help` and planning read it too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from experts.errors import CheckpointError
from experts.files import read_json_object

# One field, several spellings: ours first, then what other tools write.
ALIASES = {
    "n_routed_experts": ("num_experts", "num_local_experts"),
    "num_nextn_predict_layers": ("num_mtp_layers",),
    "torch_dtype": ("dtype",),
}
# transformers drops fields that its classes fix; these are the values they fix.
FAMILY_DEFAULTS: dict[str, dict[str, object]] = {
    "deepseek_v2": {
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
    },
    "deepseek_v3": {
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
}
FAMILY_DEFAULTS["kimi_k2"] = FAMILY_DEFAULTS["deepseek_v3"]
HINTS = {
    "torch_dtype": "float16 overflows in these models: convert the checkpoint to bfloat16",
    "rope_interleave": "half-split rotation would give wrong answers without an error",
    "quantization_config": "DeepSeek's block-quantised fp8 is the only quantised form that is read",
    "model_type": "other architectures compute other functions",
}

Size = Annotated[int, Field(ge=1, le=1 << 24)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 24)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)


class RopeScaling(_Strict):
    """YaRN. With `m(k) = 0.1 * k * ln(factor) + 1` (1 for k = 0): cos and sin are multiplied by
    `m(mscale) / m(mscale_all_dim)`, the softmax scale by `m(mscale_all_dim) ** 2`.

    An unknown key is refused: each of them would change the function.
    """

    model_config = ConfigDict(extra="forbid")

    type: Literal["yarn"]
    factor: Annotated[float, Field(ge=1.0, le=1e6)]
    original_max_position_embeddings: Size
    beta_fast: Annotated[float, Field(gt=0.0)] = 32.0
    beta_slow: Annotated[float, Field(gt=0.0)] = 1.0
    mscale: Annotated[float, Field(ge=0.0)] = 1.0
    mscale_all_dim: Annotated[float, Field(ge=0.0)] = 0.0


class Fp8Config(_Strict):
    """Block-quantised weights: e4m3 values, each 128x128 block multiplied by its scale."""

    quant_method: Literal["fp8"]
    fmt: Literal["e4m3"] = "e4m3"
    activation_scheme: Literal["dynamic"] = "dynamic"
    weight_block_size: Annotated[tuple[Literal[128], Literal[128]], Field(strict=False)]
    scale_fmt: Literal["ue8m0"] | None = None
    """`ue8m0`: scales are powers of two."""


class ModelConfig(_Strict):
    """Fields keep the names of `config.json`; `null` means absent. Widths are in values."""

    model_type: Literal["deepseek_v2", "deepseek_v3", "kimi_k2"]
    vocab_size: Size
    hidden_size: Size
    num_hidden_layers: Annotated[int, Field(ge=1, le=4096)]
    """Main layers; next-token modules follow them in the file and are not counted."""
    num_attention_heads: Size
    q_lora_rank: Size | None = None
    """None: a plain `q_proj`."""
    kv_lora_rank: Size
    qk_nope_head_dim: Size
    qk_rope_head_dim: Annotated[int, Field(ge=2, le=1 << 16, multiple_of=2)]
    v_head_dim: Size
    intermediate_size: Size
    moe_intermediate_size: Size
    n_routed_experts: Annotated[int, Field(ge=1, le=1 << 16)]
    n_shared_experts: Annotated[int, Field(ge=1, le=1024)]
    """The shared experts are one MLP of width `n_shared_experts * moe_intermediate_size`."""
    num_experts_per_tok: Annotated[int, Field(ge=1, le=1024)]
    first_k_dense_replace: Annotated[int, Field(ge=0)] = 0
    moe_layer_freq: Size = 1
    scoring_func: Literal["softmax", "sigmoid"]
    topk_method: Literal["greedy", "group_limited_greedy", "noaux_tc"]
    n_group: Size = 1
    topk_group: Size = 1
    norm_topk_prob: bool
    routed_scaling_factor: Annotated[float, Field(gt=0.0, le=1e6)]
    rope_theta: Annotated[float, Field(gt=1.0)] = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: Annotated[int, Field(ge=1, le=1 << 30)]
    rms_norm_eps: Annotated[float, Field(gt=0.0, lt=1.0)] = 1e-6
    num_nextn_predict_layers: Annotated[int, Field(ge=0, le=64)] = 0
    quantization: Fp8Config | None = Field(default=None, alias="quantization_config")
    bos_token_id: TokenId | None = None
    eos_token_ids: tuple[TokenId, ...] = ()
    torch_dtype: Literal["bfloat16", "float32", "float8_e4m3fn"] = "bfloat16"

    # Switches whose other position is another function.
    hidden_act: Literal["silu"] = "silu"
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False
    tie_word_embeddings: Literal[False] = False
    rope_interleave: Literal[True] = True

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read `config.json` and, where there is one, `generation_config.json` of a folder."""
        path = folder / "config.json"
        generation_path = folder / "generation_config.json"
        generation = read_json_object(generation_path) if generation_path.exists() else {}
        return cls.parse(read_json_object(path), generation, file=str(path))

    @classmethod
    def parse(
        cls,
        raw: Mapping[str, Any],
        generation: Mapping[str, Any] | None = None,
        file: str = "config.json",
    ) -> Self:
        """`raw`: the object of config.json. Raises CheckpointError naming the first wrong field."""
        try:
            return cls.model_validate(_normalise(raw, generation or {}))
        except ValidationError as error:
            raise _first_problem(error.errors(include_url=False)[0], file) from None

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        for holds, expected, found in self._cross_checks():
            if not holds:
                raise PydanticCustomError(
                    "config", "{expected}: {found}", {"expected": expected, "found": found}
                )
        return self

    def _cross_checks(self) -> list[tuple[bool, str, str]]:
        """(does it hold, what must hold, what is there)"""
        num_experts, groups, kept = self.n_routed_experts, self.n_group, self.topk_group
        grouped = f"n_group {groups}, topk_group {kept}, n_routed_experts {num_experts}"
        reachable = kept * (num_experts // groups) if self.is_group_limited else num_experts
        pair_needed = self.is_group_limited and self.topk_method == "noaux_tc"
        ids = [i for i in (self.bos_token_id, *self.eos_token_ids) if i is not None]
        return [
            (num_experts % groups == 0, "n_group dividing n_routed_experts", grouped),
            (kept <= groups, "topk_group of at most n_group", grouped),
            (
                self.num_experts_per_tok <= reachable,
                f"num_experts_per_tok of at most {reachable}, the experts in the kept groups",
                f"{self.num_experts_per_tok} with {grouped}",
            ),
            (
                not pair_needed or self.experts_per_group >= 2,
                "at least 2 experts in a group (noaux_tc scores a group by its best two)",
                grouped,
            ),
            (
                bool(self.moe_layers),
                "at least one mixture-of-experts layer",
                f"num_hidden_layers {self.num_hidden_layers}, first_k_dense_replace "
                f"{self.first_k_dense_replace}, moe_layer_freq {self.moe_layer_freq}",
            ),
            (
                all(i < self.vocab_size for i in ids),
                f"bos and eos ids below vocab_size {self.vocab_size}",
                str(ids),
            ),
        ]

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Numbers of the main layers that have routed experts."""
        return tuple(i for i in range(self.num_hidden_layers) if self.is_moe_layer(i))

    def is_moe_layer(self, layer: int) -> bool:
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    @property
    def latent_width(self) -> int:
        """Values cached for a token and layer: the normed latent, then the rotated shared key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def is_group_limited(self) -> bool:
        """Whether a token may only use experts of its best `topk_group` groups (V2, V3)."""
        return self.topk_method != "greedy" and self.topk_group < self.n_group

    @property
    def experts_per_group(self) -> int:
        return self.n_routed_experts // self.n_group


def _normalise(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, Any]:
    """One spelling for every field, without nulls, with the defaults of the family."""
    fields = {name: value for name, value in raw.items() if value is not None}
    for ours, others in ALIASES.items():
        for other in others:
            if ours not in fields and other in fields:
                fields[ours] = fields[other]
    family = fields.get("model_type")
    fields = (FAMILY_DEFAULTS.get(family, {}) if isinstance(family, str) else {}) | fields
    if "topk_method" not in fields:
        fields["topk_method"] = "noaux_tc" if fields.get("scoring_func") == "sigmoid" else "greedy"
    if fields["topk_method"] == "gready":  # the default of DeepSeek's own configuration class
        fields["topk_method"] = "greedy"
    if fields.get("q_lora_rank") == 0:  # DeepSeek's own files write 0 for "none"
        del fields["q_lora_rank"]
    fields["eos_token_ids"] = _eos_ids(generation.get("eos_token_id"), raw.get("eos_token_id"))
    if "bos_token_id" not in fields:
        fields["bos_token_id"] = generation.get("bos_token_id")
    return fields | _rope_fields(fields)


def _eos_ids(*candidates: Any) -> Any:
    """The first that is given; one id or a list of them."""
    given = next((c for c in candidates if c is not None), ())
    return tuple(given) if isinstance(given, list | tuple) else (given,)


def _rope_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    scaling = fields.get("rope_parameters", fields.get("rope_scaling"))
    if not isinstance(scaling, dict):
        return {} if scaling is None else {"rope_scaling": scaling}
    scaling = {name: value for name, value in scaling.items() if value is not None}
    theta = scaling.pop("rope_theta", fields.get("rope_theta", 10000.0))
    old_kind = scaling.pop("type", None)
    kind = scaling.pop("rope_type", old_kind)
    plain = kind in (None, "default") and not scaling
    return {"rope_theta": theta, "rope_scaling": None if plain else {**scaling, "type": kind}}


def _first_problem(error: ErrorDetails, file: str) -> CheckpointError:
    if error["type"] == "config":
        context = error["ctx"]
        return CheckpointError(file, context["expected"], context["found"])
    field = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return CheckpointError(file, f"a field {field}", "none")
    expected = error["msg"].removeprefix("Input should be ")
    return CheckpointError(
        file,
        f"{field} to be {expected}",
        repr(error["input"]),
        hint=HINTS.get(str(error["loc"][0])) if error["loc"] else None,
    )
