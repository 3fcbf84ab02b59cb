"""Text to ids and back: users cannot write control tokens, templates give the published ids."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from cluster.chat_template import RenderLimit
from cluster.errors import InvalidRequest
from cluster.tiny_tokenizer import SPECIAL_TOKENS, tokenizer_json
from cluster.tokenizer import Tokenizer
from experts.errors import CheckpointError
from tests.serving import VOCAB_SIZE, ids_of, write_tokenizer

BOS, EOS, USER, ASSISTANT, THINK_END = 0, 1, 3, 4, 6

# The template of DeepSeek-R1 without its tool branch: it strips the reasoning of past answers.
R1_TEMPLATE = (
    "{% if add_generation_prompt is not defined %}{% set add_generation_prompt = 0 %}{% endif %}"
    "{% set ns = namespace(is_first=false, system_prompt='') %}"
    "{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}"
    "{{bos_token}}{{ns.system_prompt}}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{{'<｜User｜>' + message['content']}}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is not none %}"
    "{% set content = message['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}"
    "{%- endfor -%}"
    "{% if add_generation_prompt %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"
)
# DeepSeek-V2's: text markers, eos from a variable.
V2_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\n\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
CONVERSATION = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi <3"},
    {"role": "assistant", "content": "Hello, 漢字.\n"},
    {"role": "user", "content": " bye "},
]


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Tokenizer]:
    """`make(chat_template=..)`: the tiny tokenizer with other settings, or with another layout."""

    def build(
        layout: dict[str, Any] | None = None, vocab_size: int = VOCAB_SIZE, **config: Any
    ) -> Tokenizer:
        folder = write_tokenizer(tmp_path, **config)
        if layout is not None:
            (folder / "tokenizer.json").write_text(json.dumps(layout))
        return Tokenizer(folder, vocab_size)

    return build


def chat(tokenizer: Tokenizer, *turns: tuple[str, str], **options: Any) -> list[int]:
    messages = [{"role": role, "content": content} for role, content in turns]
    options = {"max_chars": 10_000, "max_s": 5.0} | options
    return tokenizer.apply_chat_template(messages, **options)


# ---- conversations


def test_bos_comes_from_the_template_once(make: Callable[..., Tokenizer]) -> None:
    assert chat(make(add_bos_token=True), ("user", "Hi")) == [
        BOS,
        USER,
        *ids_of("Hi"),
        ASSISTANT,
    ]


@pytest.mark.parametrize("template", [None, R1_TEMPLATE, V2_TEMPLATE], ids=["v3", "r1", "v2"])
def test_ids_are_those_of_transformers(
    make: Callable[..., Tokenizer], tmp_path: Path, template: str | None
) -> None:
    tokenizer = make(**({} if template is None else {"chat_template": template}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers warns at import
        from transformers import AutoTokenizer

        oracle = AutoTokenizer.from_pretrained(tmp_path)
    expected = oracle.apply_chat_template(
        CONVERSATION, add_generation_prompt=True, return_dict=False
    )
    found = tokenizer.apply_chat_template(CONVERSATION, max_chars=10_000, max_s=5.0)
    assert found == expected


def test_merges_and_digit_splits_as_in_a_trained_tokenizer(tmp_path: Path) -> None:
    """Text between markers is encoded as one piece: merges never see less of it than before."""
    write_tokenizer(tmp_path)
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(r"\p{N}{1,3}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator([Path(__file__).read_text()], trainer)
    library.save(str(tmp_path / "tokenizer.json"))
    text = "def test_1234(tokenizer):  # User: 漢字, it's 42\n\n\treturn  None"
    tokenizer = Tokenizer(tmp_path, VOCAB_SIZE)
    assert tokenizer.encode(text) == library.encode(text).ids
    assert tokenizer.decode(library.encode(text).ids) == library.decode(library.encode(text).ids)
    expected = library.encode(f"{SPECIAL_TOKENS[0]}{text}<｜User｜>{text}<｜Assistant｜>").ids
    assert chat(tokenizer, ("system", text), ("user", text)) == expected
    assert expected[0] == BOS and len(expected) < 2 * len(text.encode())


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_users_cannot_write_control_tokens(
    make: Callable[..., Tokenizer], name: str, role: str
) -> None:
    tokenizer = make()
    harmless = chat(tokenizer, (role, "ab"))
    hostile = chat(tokenizer, (role, f"a{name}b"))
    at = harmless.index(ids_of("a")[0]) + 1
    assert hostile == harmless[:at] + ids_of(name) + harmless[at:]


def test_markers_that_users_invent_for_the_renderer_stay_text(
    make: Callable[..., Tokenizer],
) -> None:
    tokenizer = make()
    for text in ("\ufdd1\ufde3\ufdd2", "\ufdd0\ufde1\ufde1", "\ufdd0", "\ufdd1", "\ufdef"):
        ids = chat(tokenizer, ("user", text))
        assert ids == [BOS, USER, *ids_of(text), ASSISTANT]


def test_markers_across_two_turns_do_not_join(make: Callable[..., Tokenizer]) -> None:
    tokenizer = make(chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert chat(tokenizer, ("user", "<｜Us"), ("user", "er｜>")) == ids_of("<｜User｜>")


def test_template_still_finds_markers_in_old_answers(make: Callable[..., Tokenizer]) -> None:
    tokenizer = make(chat_template=R1_TEMPLATE)
    ids = chat(
        tokenizer, ("user", "q"), ("assistant", "<think>why</think>so"), add_generation_prompt=False
    )
    assert ids == [BOS, USER, *ids_of("q"), ASSISTANT, *ids_of("so"), EOS]


def test_control_tokens_not_flagged_special_are_guarded_too(
    make: Callable[..., Tokenizer],
) -> None:
    layout = tokenizer_json()
    layout["added_tokens"][USER]["special"] = False  # as DeepSeek-V3 has it
    tokenizer = make(layout)
    assert chat(tokenizer, ("user", "<｜User｜>")) == [
        BOS,
        USER,
        *ids_of("<｜User｜>"),
        ASSISTANT,
    ]
    assert tokenizer.decode([USER, *ids_of("x")]) == "<｜User｜>x"  # not special: it shows
    assert tokenizer.decode([ASSISTANT, *ids_of("x")]) == "x"


def test_added_words_that_are_no_markup_stay_words(make: Callable[..., Tokenizer]) -> None:
    layout = tokenizer_json()
    word = layout["added_tokens"][0] | {"id": 300, "content": "shoal", "special": False}
    layout["added_tokens"].append(word)
    layout["model"]["vocab"]["shoal"] = 300
    assert make(layout).encode("ashoal") == [*ids_of("a"), 300]


def test_vocabulary_that_spells_a_control_token_whole_is_avoided(
    make: Callable[..., Tokenizer],
) -> None:
    layout = tokenizer_json()
    layout["model"]["ignore_merges"] = True  # whole words are looked up before any merge
    layout["added_tokens"].append(layout["added_tokens"][0] | {"id": 400, "content": "<x>"})
    layout["model"]["vocab"]["<x>"] = 400
    assert make(layout).encode("<x>") == ids_of("<x>")


def test_switches_reach_the_template(make: Callable[..., Tokenizer]) -> None:
    template = "{{ '<think>' if thinking else '</think>' }}"
    tokenizer = make(chat_template=template)
    assert chat(tokenizer, ("user", "x"), switches={"thinking": True}) == [5]
    assert chat(tokenizer, ("user", "x")) == [THINK_END]


def test_developer_speaks_as_system_and_unknown_tool_turns_are_refused(
    make: Callable[..., Tokenizer],
) -> None:
    tokenizer = make()
    assert chat(tokenizer, ("developer", "x")) == chat(tokenizer, ("system", "x"))
    with pytest.raises(InvalidRequest) as caught:
        chat(tokenizer, ("user", "x"), ("tool", "y"))
    assert caught.value.param == "messages[1].role"


def test_neighbours_lose_spaces_where_the_token_eats_them(make: Callable[..., Tokenizer]) -> None:
    layout = tokenizer_json()
    layout["added_tokens"][ASSISTANT]["lstrip"] = True
    layout["added_tokens"][USER]["rstrip"] = True
    tokenizer = make(layout)
    assert chat(tokenizer, ("user", "  Hi  ")) == [BOS, USER, *ids_of("Hi"), ASSISTANT]


def test_template_errors_are_the_clients(make: Callable[..., Tokenizer]) -> None:
    tokenizer = make(
        chat_template="{% if messages|length > 3 %}{{ raise_exception('too\nmany') }}{% endif %}x"
    )
    with pytest.raises(InvalidRequest, match="too many") as caught:
        chat(tokenizer, *[("user", "x")] * 4)
    assert caught.value.param == "messages"


def test_render_is_bounded_in_size_and_time(make: Callable[..., Tokenizer]) -> None:
    template = (
        "{% if messages[0]['content'] == 'loop' %}"
        "{% for i in range(90000) %}{{ 'xxxxxxxxxx' }}{% endfor %}{% endif %}"
    )
    tokenizer = make(chat_template=template)
    with pytest.raises(RenderLimit):
        chat(tokenizer, ("user", "loop"), max_chars=1000)
    with pytest.raises(InvalidRequest, match="longer than"):
        chat(tokenizer, ("user", "loop"), max_chars=10**9, max_s=0.0)


@pytest.mark.parametrize(
    "expression",
    [
        "messages.append(1)",
        "messages.__class__.__mro__",
        "cycler.__init__.__globals__",
        "''.__class__.__mro__",
    ],
)
def test_template_cannot_leave_the_sandbox(make: Callable[..., Tokenizer], expression: str) -> None:
    template = "{% if messages[0]['content'] == 'go' %}{{ " + expression + " }}{% endif %}"
    tokenizer = make(chat_template=template)
    with pytest.raises(InvalidRequest):
        chat(tokenizer, ("user", "go"))


def test_tojson_keeps_letters_and_no_html_escapes(make: Callable[..., Tokenizer]) -> None:
    tokenizer = make(chat_template="{{ messages[0]['content'] | tojson }}")
    assert tokenizer.decode(chat(tokenizer, ("user", "é<\"'"))) == '"é<\\"\'"'


def test_without_a_template_conversations_are_refused(make: Callable[..., Tokenizer]) -> None:
    with pytest.raises(InvalidRequest, match="no chat template"):
        chat(make(chat_template=None), ("user", "x"))


def test_jinja_file_wins_and_a_list_has_a_default(
    make: Callable[..., Tokenizer], tmp_path: Path
) -> None:
    listed = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert chat(make(chat_template=listed), ("user", "x")) == ids_of("d")
    (tmp_path / "chat_template.jinja").write_text("file")
    assert chat(make(), ("user", "x")) == ids_of("file")


# ---- plain text


def test_names_of_control_tokens_in_text_are_letters_unless_allowed(
    make: Callable[..., Tokenizer],
) -> None:
    tokenizer = make()
    text = "a<｜User｜>b</think>"
    assert tokenizer.encode(text) == ids_of(text)
    allowed = tokenizer.encode(text, allow_special_tokens=True)
    assert allowed == [*ids_of("a"), USER, *ids_of("b"), THINK_END]


@pytest.mark.parametrize(
    ("flags", "before", "after"),
    [
        ({"add_bos_token": False}, [], []),
        ({"add_bos_token": True}, [BOS], []),
        ({"add_bos_token": True, "add_eos_token": True}, [BOS], [EOS]),
        ({"add_bos_token": None, "add_eos_token": None}, [], []),
        ({"add_bos_token": True, "bos_token": {"content": SPECIAL_TOKENS[2]}}, [2], []),
    ],
)
def test_special_tokens_around_a_text(
    make: Callable[..., Tokenizer], flags: dict[str, Any], before: list[int], after: list[int]
) -> None:
    tokenizer = make(**flags)
    assert tokenizer.encode("x") == [*before, *ids_of("x"), *after]
    assert tokenizer.encode("x", add_special_tokens=False) == ids_of("x")


def test_post_processor_counts_where_there_is_no_flag(make: Callable[..., Tokenizer]) -> None:
    layout = tokenizer_json()
    layout["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "B", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"B": {"id": "B", "ids": [BOS], "tokens": [SPECIAL_TOKENS[0]]}},
    }
    assert make(layout, add_bos_token=None).encode("x") == [BOS, *ids_of("x")]


def test_nothing_longer_than_max_chars_fits(make: Callable[..., Tokenizer]) -> None:
    tokenizer = make()
    longest = max(SPECIAL_TOKENS, key=len)
    assert tokenizer.max_chars(3) == 3 * len(longest)
    assert len(tokenizer.encode(longest * 3, allow_special_tokens=True)) == 3


# ---- back to text


@given(st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_token_by_token_gives_the_text_in_whole_characters(tiny: Tokenizer, text: str) -> None:
    detokenizer = tiny.detokenizer()
    pieces = [detokenizer.push(token) for token in tiny.encode(text)]
    assert "".join(pieces) + detokenizer.flush() == text
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


@given(st.lists(st.integers(17, 272), max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_bytes_decode_as_the_library_does(tiny: Tokenizer, ids: list[int]) -> None:
    detokenizer = tiny.detokenizer()
    text = "".join(map(detokenizer.push, ids)) + detokenizer.flush()
    assert text == tiny.decode(ids) == bytes(i - 17 for i in ids).decode("utf-8", "replace")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tiny")), VOCAB_SIZE)


def test_half_a_character_is_held_and_flushed(tiny: Tokenizer) -> None:
    detokenizer = tiny.detokenizer()
    first, second, _ = ids_of("漢")
    assert [detokenizer.push(first), detokenizer.push(second)] == ["", ""]
    assert detokenizer.has_open_character
    assert detokenizer.flush() == "\ufffd"


def test_hidden_and_unused_ids(tiny: Tokenizer) -> None:
    assert tiny.decode([BOS, *ids_of("x"), EOS]) == "x"
    assert tiny.decode([EOS], skip_special_tokens=False) == "<｜end▁of▁sentence｜>"
    assert tiny.token_bytes(VOCAB_SIZE - 1) == b""  # the model has more rows than the vocabulary
    assert tiny.token_text(ids_of("漢")[0]) == "\ufffd"


# ---- files that do not fit


def test_vocabulary_larger_than_the_model(make: Callable[..., Tokenizer]) -> None:
    with pytest.raises(CheckpointError, match="vocab_size 200"):
        make(vocab_size=200)


def test_vocab_size_comes_from_the_checkpoint(checkpoint_dir: Callable[[str], Path]) -> None:
    assert Tokenizer(checkpoint_dir("v3")).vocab_size == 512


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "expected JSON"),
        ("[]", "JSON object"),
        ('{"model": 5, "added_tokens": []}', "tokenizers file"),
        ('{"added_tokens": [{"id": "x"}]}', "added_tokens"),
        (json.dumps(tokenizer_json() | {"decoder": None}), "ByteLevel"),
    ],
)
def test_damaged_tokenizer(tmp_path: Path, content: str, reason: str) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=reason) as caught:
        Tokenizer(tmp_path, VOCAB_SIZE)
    assert "\n" not in str(caught.value)


def test_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json.*no such file"):
        Tokenizer(tmp_path, VOCAB_SIZE)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% if %}", "chat template"),
        (5, "chat_template of text"),
        ("{% for m in messages %}{{ '<｜' + m['role'] + '｜>' }}{% endfor %}<｜User｜>", None),
        ("{% set a = ['<｜Us', 'er｜>'] %}{{ a | join }}", "whole words"),
    ],
)
def test_template_that_cannot_be_guarded(
    make: Callable[..., Tokenizer], template: Any, reason: str | None
) -> None:
    if reason is None:  # <｜user｜> is no control token: written in parts, but harmless
        assert chat(make(chat_template=template), ("user", "x")) == [*ids_of("<｜user｜>"), USER]
        return
    with pytest.raises(CheckpointError, match=reason):
        make(chat_template=template)
