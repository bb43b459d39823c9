"""Rows in every form that SFTTrainer takes."""

from helpers.tokenizers import EOS

IDS = list(range(10, 22))


def turn(role, content):
    return {"role": role, "content": content}


def from_value(role, content):
    return {"from": role, "value": content}


def chats(turn=turn):
    return [
        [turn("user", "what is the sky"), turn("assistant", "the sky is blue")],
        [turn("system", "user assistant"), turn("user", "it"), turn("assistant", "is"), turn("user", "blueberry pie")],
        [turn("user", "the sky " * 10), turn("assistant", "pie"), turn("user", "pie"), turn("assistant", "today")],
    ]


TEXTS = ["the sky is blue", "it is blue today" + EOS, "blueberry pie " * 10, "x", f"pie{EOS}{EOS}"]
PAIRS = [
    {"prompt": "what is the sky", "completion": " blue"},
    {"prompt": "the sky is bl", "completion": "ueberry"},  # tokens merge across the boundary
    {"prompt": "it is blue", "completion": " today" + EOS},
    {"prompt": "the sky is blue " * 10, "completion": "pie"},
    {"prompt": "it", "completion": ""},
    {"prompt": "", "completion": "blueberry pie"},
]
MASKED = [
    {"input_ids": IDS, "completion_mask": [0] * 5 + [1] * 7, "assistant_masks": [0, 1] * 6},
    {"input_ids": IDS[:4], "completion_mask": [0, 0, 1, 1], "assistant_masks": [1, 1, 1, 0]},
    {"input_ids": IDS[:4], "completion_mask": [0, 0, 0, 1], "assistant_masks": [1, 1, 1, 0]},
]
TOOLS = '[{"type": "function", "function": {"name": "sky"}}]'


def only(rows, *columns):
    return [{column: row[column] for column in columns} for row in rows]


FORMS = {
    "text": [{"text": text} for text in TEXTS],
    "prompt-completion": PAIRS,
    "prompt-completion-text": [
        {**pair, "text": text} for pair, text in zip(PAIRS, ["a", EOS, "b", EOS, "c", EOS], strict=True)
    ],
    "messages": [{"messages": chat} for chat in chats()],
    "messages-text": [{"messages": chat, "text": "not this"} for chat in chats()],
    "conversations": [{"conversations": chat} for chat in chats(from_value)],
    "conversations-text": [{"conversations": chat, "text": "this"} for chat in chats()],
    "prompt-completion-messages": [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in chats()],
    "tools-json": [{"messages": chat, "tools": TOOLS} for chat in chats()],
    "tools": [{"messages": chat, "tools": [{"name": "sky"}]} for chat in chats()],
    "chat-template-kwargs": [
        {"prompt": chat[:1], "completion": chat[1:], "chat_template_kwargs": {"shout": i == 1}}
        for i, chat in enumerate(chats())
    ],
    "input_ids": [{"input_ids": IDS}, {"input_ids": IDS[:3]}, {"input_ids": IDS[:1]}],
    "labels": [
        {"input_ids": IDS, "labels": [-100] * 9 + IDS[9:]},
        {"input_ids": IDS, "labels": IDS[:3] + [-100] * 9},
        {"input_ids": IDS, "labels": [-100] * 12},
        {"input_ids": IDS[:4], "labels": [-100, 30, 31, 32]},  # other tokens than the input's
        {"input_ids": IDS[:4], "labels": [10, -100, -100, -100]},
    ],
    "labels-and-masks": [{**row, "labels": row["input_ids"]} for row in MASKED],
    "completion_mask": only(MASKED, "input_ids", "completion_mask"),
    "assistant_masks": only(MASKED, "input_ids", "assistant_masks"),
    "both-masks": MASKED,
    "masks-and-text": [{**row, **pair} for row, pair in zip(MASKED, PAIRS, strict=False)],
    "attention_mask": [
        {"input_ids": IDS[:n], "attention_mask": [1] * n, "position_ids": list(range(n))} for n in (3, 9)
    ],
}
