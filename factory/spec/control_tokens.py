"""Control tokens of chat formats, and texts in which none is left whole.

A server's tokenizer reads a control token wherever in a text it stands. Threat: an answer, a
prompt, a rubric line or a principle that ends its turn and goes on as the system, or opens a tool's
result.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property, lru_cache
from typing import Any

from prefab.factory.types import Message

# Forms that only control tokens have, always broken.
FORMS = re.compile(
    r"<\|[^<>|\s][^<>|]{0,40}\|>|<｜[^<>｜]{1,40}｜>|</?s>|\[/?(?:INST|SYSTEM_PROMPT|TOOL_CALLS|AVAILABLE_TOOLS|CLS|SEP|MASK|PAD|UNK)\]"
    r"|<</?SYS>>|</?(?:start|end)_of_(?:turn|image)>|<(?:bos|eos|pad|unk|mask|cls|sep)>|</?(?:think|tool_call|tool_response)>",
    re.IGNORECASE,
)
# Control tokens of families of models, for servers whose tokenizer cannot be read. What `FORMS` has
# is here too, because a server is asked which of these are one token to it.
# Sources: the families' tokenizer_config.json and, for Mistral, mistral_common.
FAMILIES = {
    "chatml, qwen, smollm, internlm, yi": (
        "<|im_start|> <|im_end|> <|im_sep|> <|endoftext|> <|startoftext|> <|endofprompt|> "
        "<|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> <|quad_start|> "
        "<|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> "
        "<|action_start|> <|action_end|> <|plugin|> <|interpreter|> <think> </think> <tool_call> "
        "</tool_call> <tool_response> </tool_response>"
    ),
    "gpt-oss": "<|start|> <|end|> <|message|> <|channel|> <|constrain|> <|return|> <|call|>",
    "llama 2": "<s> </s> <unk> <pad> [INST] [/INST] <<SYS>> <</SYS>>",
    "llama 3, 4": (
        "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|header_start|> "
        "<|header_end|> <|eot_id|> <|eom_id|> <|eot|> <|eom|> <|python_tag|> <|python_start|> "
        "<|python_end|> <|finetune_right_pad_id|> <|image_start|> <|image_end|> <|image|> "
        "<|patch|> <|step_id|>"
    ),
    "mistral": (
        "[SYSTEM_PROMPT] [/SYSTEM_PROMPT] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS] "
        "[TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CONTENT] [ARGS] [CALL_ID] [THINK] [/THINK] "
        "[MODEL_SETTINGS] [/MODEL_SETTINGS] [IMG] [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] "
        "[SUFFIX] [AUDIO] [BEGIN_AUDIO] [TRANSCRIBE]"
    ),
    "gemma": (
        "<bos> <eos> <mask> <start_of_turn> <end_of_turn> <start_of_image> <end_of_image> "
        "<image_soft_token> <start_of_audio> <end_of_audio> <audio_soft_token> <|turn> <turn|> "
        "<|channel> <channel|> <|tool> <tool|> <|tool_call> <tool_call|> <|tool_response> "
        "<tool_response|> <|think|> <|image> <image|> <|audio> <audio|>"
    ),
    "glm": (
        "[gMASK] [sMASK] [MASK] <sop> <eop> <|system|> <|user|> <|assistant|> <|observation|> "
        "<|begin_of_image|> <|end_of_image|> <arg_key> </arg_key> <arg_value> </arg_value>"
    ),
    "deepseek": (
        "<｜begin▁of▁sentence｜> <｜end▁of▁sentence｜> <｜User｜> <｜Assistant｜> <｜▁pad▁｜> <|EOT|> "
        "<｜tool▁calls▁begin｜> <｜tool▁calls▁end｜> <｜tool▁call▁begin｜> <｜tool▁call▁end｜> "
        "<｜tool▁outputs▁begin｜> <｜tool▁outputs▁end｜> <｜tool▁output▁begin｜> <｜tool▁output▁end｜> "
        "<｜tool▁sep｜> <｜fim▁begin｜> <｜fim▁hole｜> <｜fim▁end｜>"
    ),
    "exaone": "[|system|] [|user|] [|assistant|] [|tool|] [|endofturn|] [BOS]",
    "kimi": (
        "[BOS] [EOS] [EOT] [PAD] [UNK] <|im_user|> <|im_assistant|> <|im_system|> <|im_middle|> "
        "<|tool_calls_section_begin|> <|tool_calls_section_end|> <|tool_call_begin|> "
        "<|tool_call_argument_begin|> <|tool_call_end|>"
    ),
    "command": (
        "<BOS_TOKEN> <EOS_TOKEN> <EOP_TOKEN> <PAD> <UNK> <CLS> <SEP> <MASK_TOKEN> "
        "<|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> "
        "<|SYSTEM_TOKEN|> <|START_RESPONSE|> <|END_RESPONSE|> <|START_THINKING|> <|END_THINKING|> "
        "<|START_ACTION|> <|END_ACTION|> <|START_TOOL_RESULT|> <|END_TOOL_RESULT|>"
    ),
    "phi, granite, jamba": (
        "<|placeholder1|> <|dummy_0|> <|tool|> <|/tool|> <|tool_call|> <|/tool_call|> "
        "<|tool_response|> <|start_of_role|> <|end_of_role|> <|bom|> <|eom|>"
    ),
    "falcon": (
        ">>TITLE<< >>ABSTRACT<< >>INTRODUCTION<< >>SUMMARY<< >>COMMENT<< >>ANSWER<< >>QUESTION<< "
        ">>DOMAIN<< >>EMAIL_ADDRESS<< >>IP_ADDRESS<< >>PREFIX<< >>SUFFIX<< >>MIDDLE<<"
    ),
    "minimax": (
        "]~b] ]~!b[ [e~[ ]!p~[ ]!d~[ <beginning_of_sentence> <end_of_sentence> "
        "<minimax:tool_call> </minimax:tool_call>"
    ),
    "seed": (
        "<seed:bos> <seed:eos> <seed:pad> <seed:think> </seed:think> <seed:tool_call> "
        "</seed:tool_call>"
    ),
    "nemotron, apertus, t5": (
        "<SPECIAL_10> <SPECIAL_11> <SPECIAL_12> <SPECIAL_13> <extra_id_0> <extra_id_1> "
        "<AVAILABLE_TOOLS> </AVAILABLE_TOOLS> <TOOLCALL> </TOOLCALL> <TOOL_RESPONSE> "
        "</TOOL_RESPONSE>"
    ),
    "baichuan, internlm": (
        "<reserved_102> <reserved_103> <reserved_106> <reserved_107> [UNUSED_TOKEN_145] "
        "[UNUSED_TOKEN_146] <TOKENS_UNUSED_0> <TOKENS_UNUSED_1>"
    ),
    "code": (
        "<fim_prefix> <fim_middle> <fim_suffix> <fim_pad> <PRE> <MID> <SUF> <EOT> <|fim_prefix|> "
        "<|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>"
    ),
    "longcat": (
        "<longcat_s> <longcat_user> <longcat_assistant> <longcat_system> <longcat_think> "
        "</longcat_think> <longcat_tool_call> </longcat_tool_call>"
    ),
    "telechat": "<_start> <_end> <_user> <_bot> <_system> <_observation> <_pad>",
    "function gemma": (
        "<start_function_call> <end_function_call> <start_function_declaration> "
        "<end_function_declaration> <start_function_response> <end_function_response>"
    ),
    "bert": "[CLS] [SEP] [MASK] [PAD] [UNK]",
}
_HTML = re.compile(r"</?[a-z][a-z0-9]{0,10}>")  # tags that some tokenizers have as one token


class SpecialTokens(tuple[str, ...]):
    """The spellings of a tokenizer's control tokens, with the pattern that finds them. Hashed and
    compared once, not token by token: they are part of the keys of caches.
    """

    @cached_property
    def pattern(self) -> re.Pattern[str] | None:
        """The tokens that `FORMS` does not find; None where it finds them all. The longest one
        matches.
        """
        own = [token for token in self if len(token) > 1 and not FORMS.fullmatch(token)]
        return re.compile(_alternatives(own)) if own else None

    @cached_property
    def _hash(self) -> int:
        return tuple.__hash__(self)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or tuple.__eq__(self, other) is True

    def __ne__(self, other: object) -> bool:
        return not self == other


KNOWN_SPECIALS = SpecialTokens(dict.fromkeys(" ".join(FAMILIES.values()).split()))


def is_control(token: str, special: bool) -> bool:
    """Whether a tokenizer's added token is to be broken: all that are marked as special, and of the
    others (`<tool_call>`) all but white space and tags of HTML.
    """
    return bool(token.strip()) and (special or not _HTML.fullmatch(token))


def neutralise(text: str, specials: Iterable[str] = ()) -> str:
    """The text with every control token's spelling broken by a space, so that no tokenizer reads it
    as one.

    A space, not an invisible character: some normalisers remove those and put the token together
    again. `specials` are the served tokenizer's own control tokens, beside the forms known here.
    """
    broken = int("<" in text or "[" in text)
    while broken:  # a token within a broken one is seen in the next round
        text, broken = FORMS.subn(_broken, text)
    return break_tokens(text, specials) if specials else text


def neutral_messages(
    messages: Iterable[Message], specials: Iterable[str] = ()
) -> tuple[Message, ...]:
    """A conversation whose texts and tool calls are neutralised."""
    return tuple(
        Message(m.role, neutralise(m.content, specials), m.more and neutralise(m.more, specials))
        for m in messages
    )


def break_tokens(text: str, specials: Iterable[str]) -> str:
    """The text with these tokens' spellings broken, and no others."""
    pattern = specials.pattern if isinstance(specials, SpecialTokens) else _pattern(tuple(specials))
    broken = 1
    while broken and pattern is not None:
        text, broken = pattern.subn(_broken, text)
    return text


@lru_cache(maxsize=1024)
def neutralised(text: str, specials: tuple[str, ...]) -> str:
    """`neutralise` of texts that many requests share."""
    return neutralise(text, specials)


def _broken(found: re.Match[str]) -> str:
    token = found[0]
    return f"{token[0]} {token[1:]}"


@lru_cache(maxsize=64)
def _pattern(tokens: tuple[str, ...]) -> re.Pattern[str] | None:
    return SpecialTokens(tokens).pattern


def _alternatives(tokens: Iterable[str]) -> str:
    """A pattern that finds these tokens in time independent of their number: a tree of common
    beginnings.
    """
    root: dict[str, Any] = {}
    for token in tokens:
        node = root
        for character in token:
            node = node.setdefault(character, {})
        node[""] = {}  # a token ends here
    return _branches(root)


def _branches(node: dict[str, Any]) -> str:
    parts = [re.escape(c) + _branches(node[c]) for c in sorted(node) if c]
    if not parts:
        return ""
    if len(parts) == 1 and "" not in node:
        return parts[0]
    return f"(?:{'|'.join(parts)})" + ("?" if "" in node else "")
