"""The model that ships: what it answers to the README's prompts, token by token.

Answers are compared with default_model_golden.json, so that a later numerical change shows. After
training a new model write that file anew, read it, and copy its answers into README.md:

    .venv/bin/python -m tests.cluster.test_default_model
"""

from __future__ import annotations

import asyncio
import json
import time
import tomllib
import warnings
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from cluster import machine_code
from cluster.config import default_model, parse_config
from cluster.frontend.openai import ChatCompletionRequest
from cluster.frontend.schema_errors import parse_body
from cluster.inline import InlineCluster
from cluster.model_store import EXAMPLE_PROMPT, check_model
from tests.cluster.test_cli import shoal

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "default_model_golden.json"
MAX_TOKENS = 256
MAX_BYTES = 25_000_000
MAX_LOAD_S = 60.0  # 3 s is the aim on a quiet laptop; a shared machine may take many times that
PROMPTS = {
    "stories": EXAMPLE_PROMPT,
    "arithmetic": "What is 38 + 46?",
    "facts": "What do you call a baby cow?",
    "code": "Write a function that multiplies a number by 86.",
    "French": 'How do you say "the black book" in French?',
    "chat": "What is a mixture of experts?",
    "reading": "Sam has a red drum. Tilda has a green bag. What is the color of the bag?",
    "anything else": "Tell me about black holes.",
}


def messages(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


async def chat(cluster: InlineCluster, prompt: str) -> tuple[list[int], str]:
    """Ids and text of an answer to a request that names no temperature."""
    fields = {"messages": messages(prompt), "max_tokens": MAX_TOKENS}
    body = parse_body(ChatCompletionRequest, fields)
    ids, text = [], ""
    with closing(await cluster.ingress.service.chat(body)) as generation:
        async for delta in generation:
            ids += delta.token_ids
            text += delta.text
    return ids, text


@pytest.fixture(scope="module")
def cluster() -> Iterator[InlineCluster]:
    with InlineCluster(parse_config({"model": default_model()})) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def golden() -> list[dict[str, Any]]:
    return list(json.loads(GOLDEN.read_text(encoding="utf-8")))


def test_answers_are_the_golden_ones(cluster: InlineCluster, golden: list[dict[str, Any]]) -> None:
    assert {item["domain"]: item["prompt"] for item in golden} == PROMPTS
    for item in golden:
        ids, text = asyncio.run(chat(cluster, item["prompt"]))
        assert (ids, text) == (item["token_ids"], item["answer"])


def test_every_answer_ends_its_turn(golden: list[dict[str, Any]]) -> None:
    eos = check_model(default_model()).eos_token_ids
    for item in golden:
        assert item["token_ids"][-1] in eos and not set(item["token_ids"][:-1]) & set(eos)


def test_transformers_gives_the_same_tokens(golden: list[dict[str, Any]]) -> None:
    import torch

    from tests.huggingface import load_model

    model = load_model(default_model())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(default_model())
    assert type(model).__name__ == "DeepseekV3ForCausalLM"
    for item in golden:
        prompt = tokenizer.apply_chat_template(
            messages(item["prompt"]), add_generation_prompt=True, return_dict=False
        )
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        with torch.no_grad():
            out = model.generate(ids, attention_mask=mask, max_new_tokens=MAX_TOKENS)
        assert out[0, len(prompt) :].tolist() == item["token_ids"]


def test_files_pass_every_check_and_are_small() -> None:
    model = check_model(default_model())
    assert model.model_type == "deepseek_v3" and model.q_lora_rank and model.is_group_limited
    assert sum(file.stat().st_size for file in default_model().iterdir()) <= MAX_BYTES


def test_loads_quickly(record_property: pytest.RecordProperty) -> None:
    machine_code.compile_all()
    started = time.perf_counter()
    check_model(default_model())
    with InlineCluster(parse_config({"model": default_model()})):
        load_s = time.perf_counter() - started
    record_property("load_s", load_s)
    print(f"checked and ready in {load_s:.2f} s")
    assert load_s < MAX_LOAD_S


def test_package_data_is_every_file_of_the_models() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    package = ROOT / "cluster"
    patterns = [p for p in settings["package-data"]["cluster"] if p.startswith("models/")]
    packed = {file for pattern in patterns for file in package.glob(pattern)}
    assert packed == {file for file in (package / "models").rglob("*") if file.is_file()}
    assert {file.name for file in packed} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }


def test_run_without_a_model_answers_with_it(golden: list[dict[str, Any]]) -> None:
    done = shoal("run", "--inline", EXAMPLE_PROMPT)
    assert (done.returncode, done.stdout) == (0, golden[0]["answer"] + "\n"), done.stderr
    assert parse_config({"model": default_model()}).model_name == "shoal-tiny"


def test_readme_shows_these_answers(golden: list[dict[str, Any]]) -> None:
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    for item in golden:
        assert item["prompt"] in text
        for line in item["answer"].splitlines():
            assert line.strip() in text


def write_golden() -> None:
    """The golden file, from the model as it is."""
    items = []
    with InlineCluster(parse_config({"model": default_model()})) as cluster:
        for domain, prompt in PROMPTS.items():
            ids, text = asyncio.run(chat(cluster, prompt))
            items.append({"domain": domain, "prompt": prompt, "answer": text, "token_ids": ids})
            print(f"{domain}: {prompt}\n  {text}")
    lines = (json.dumps(item, ensure_ascii=False) for item in items)
    GOLDEN.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    write_golden()
