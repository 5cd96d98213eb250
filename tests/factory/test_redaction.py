"""Secrets are refused in configuration and removed by value from whatever is printed or kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from prefab.factory import redaction
from prefab.factory.errors import ConfigError, EngineError
from prefab.factory.printable import printable
from prefab.factory.redaction import redact, redact_bytes, secrets_in
from prefab.pipelines.config.schema import load_pipeline, make_pipeline

KEY = "sk-planted-0123456789abcdef/+x"
PIPELINE: dict[str, Any] = {
    "recipe": "rlaif",
    "name": "n",
    "constitution": "microworld",
    "prompts": {"source": "microworld"},
    "engines": {"a": {"engine": "openai", "model": "m"}},
    "policy": {"engine": "a"},
    "panel": {"judges": [{"name": "j", "kind": "pairwise"}]},
}


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    """Each test begins with no known secret."""
    before = dict(redaction._known)
    redaction._known.clear()
    yield
    redaction._known.clear()
    redaction._known.update(before)


def test_a_known_secret_is_removed_in_each_form() -> None:
    redaction.add_secret(KEY)
    redaction.add_secret(KEY + "-longer")
    quoted = "sk-planted-0123456789abcdef%2F%2Bx"
    assert redact(f"a {KEY} b {quoted} c {KEY}-longer") == "a [redacted] b [redacted] c [redacted]"
    assert printable(f"\x1b{KEY}") == "\\u001b[redacted]"
    assert str(EngineError(f"server says {KEY}")) == "server says [redacted]"
    escaped = "".join(f"\\u{ord(c):04x}" for c in KEY)
    slashed, lower = KEY.replace("/", "\\/"), quoted.replace("2F", "2f").replace("2B", "2b")
    for said in (KEY, escaped, slashed, lower):
        body = f'{{"error": "{said}"}}'.encode()
        assert orjson.loads(redact_bytes(body)) == {"error": "[redacted]"}, said
    assert redact_bytes(b'{"a": NaN, "b": "\\u0041"}') == b'{"a": NaN, "b": "\\u0041"}'


@pytest.mark.parametrize("word", ["EMPTY", "none", "", "unnecessary", None])
def test_a_word_is_no_secret(word: str | None) -> None:
    redaction.add_secret(word)
    assert redact("EMPTY none unnecessary") == "EMPTY none unnecessary"


def test_the_environments_secrets_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "OTHER_API_KEY": "0123456789abcdef",
        "HF_TOKEN": "abcdefgh12345678",
        "SSH_KEY": "/run/keys/1.ssh-id-rsa",  # a path
        "KEYBOARD": "de-latin1-nodead",
        "SHORT_TOKEN": "a1b2c3",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    redaction.add_environment_secrets()
    kept = [name for name, value in values.items() if redact(value) == value]
    assert kept == ["SSH_KEY", "KEYBOARD", "SHORT_TOKEN"]


REFUSED: dict[str, dict[str, Any]] = {
    "key as a variable's name": {"api_key_env": "sk-planted-0123456789abcdef"},
    "other key as a variable's name": {"api_key_env": "0f8a7bc6d5e4f3a2b1c0d9e8f7a6"},
    "text as a variable's name": {"api_key_env": "hunter2-hunter2"},
    "url with a password": {"base_url": "https://me:hunter2-hunter2@host/v1"},
    "url with a user": {"base_url": "https://hunter2-hunter2@host/v1"},
    "extra body by name": {"extra_body": {"auth": {"api_key": "hunter2-hunter2"}}},
    "extra body by form": {"extra_body": {"x": ["hf_0123456789abcdefghij"]}},
    "bearer": {"extra_body": {"x": "Bearer sk-planted-0123456789abcdef"}},
    "model": {"model": "gsk_0123456789abcdef0123"},
    "env": {"engine": "vllm", "env": {"HF_TOKEN": "hunter2-hunter2"}},
    "args": {"engine": "vllm", "args": ["--api-key", "hunter2-hunter2"]},
    "args with =": {"engine": "vllm", "args": ["--api-key=hunter2-hunter2"]},
}


@pytest.mark.parametrize("fields", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("by_set", [False, True])
def test_a_secret_in_a_configuration_is_refused_and_never_shown(
    fields: dict[str, Any], by_set: bool
) -> None:
    engine = {"engine": "openai", "model": "m", **fields}
    sets = [f"engines.a={orjson.dumps(engine).decode()}"] if by_set else []
    with pytest.raises(ConfigError) as error:
        make_pipeline(PIPELINE if by_set else PIPELINE | {"engines": {"a": engine}}, sets)
    told = "\n".join([str(error.value), *map(str, error.value.problems)])
    assert "engines.a." in told and ("api_key_env" in told or "in your shell" in told)
    for value in ("sk-planted", "0f8a7bc6", "hunter2", "gsk_01", "hf_0123"):
        assert value not in printable(told)


def test_ordinary_configuration_holds_no_secret() -> None:
    value = {
        "base_url": "https://host/v1?a=b@c",
        "api_key_env": "MY_COMPANYS_KEY_2",
        "extra_body": {"max_tokens": 4, "provider": {"order": ["a"]}, "eos_token": ""},
        "env": {"VLLM_USE_V1": "1", "TOKENIZERS_PARALLELISM": "false"},
        "args": ["--max-num-seqs", "4", "--tokenizer-mode", "auto"],
        "text": "my key sk-planted-0123456789abcdef in a sentence",
    }
    assert list(secrets_in(value)) == []


def test_a_file_of_passwords_is_not_shown(tmp_path: Path) -> None:
    """A file that was not meant (`/etc/shadow`) shows at most the beginning of a key."""
    for text in ("root:$y$j9T$HASH$HASH:19000:0:99999:7:::\ndaemon:*:19000::::\n", "HASH alone\n"):
        (tmp_path / "shadow").write_text(text)
        with pytest.raises(ConfigError) as error:
            load_pipeline(tmp_path / "shadow")
        assert "HASH" not in str(error.value)
