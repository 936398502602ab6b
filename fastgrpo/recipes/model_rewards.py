"""Recipe rewards that need a model and the trainer's processor: bound when the trainer is built.

Each is made from plain settings of a YAML file; `model: null` means the policy itself, a path a
frozen model loaded from there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fastgrpo.engine import score
from fastgrpo.errors import InputError
from fastgrpo.judges import (
    ChoiceProbability,
    CoTrainedReward,
    FollowUpLikelihood,
    ImplicitProcessReward,
    SecondPass,
)
from fastgrpo.models.family import TEXT_OUTPUTS
from fastgrpo.packing import Group
from fastgrpo.rewards.read.chat import completion_text
from fastgrpo.rewards.read.tags import between


class Bound:
    """A reward function that is built by ``bind(trainer)``."""

    def __init__(self, name: str, columns: Sequence[str] = ()):
        self.name = name
        self.__name__ = name.replace("/", "_")
        self.columns = tuple(columns)
        self.inner: Callable | None = None

    def __call__(self, prompts, completions, **columns):
        """The rewards of a batch."""
        if self.inner is None:
            raise InputError(f"{self.name}: no trainer bound")
        return self.inner(prompts=prompts, completions=completions, **columns)

    def state_dict(self) -> dict[str, Any]:
        """What the reward keeps between batches; {} if nothing."""
        return self.inner.state_dict() if hasattr(self.inner, "state_dict") else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned; the trainer must be bound."""
        self.inner.load_state_dict(state)


def encode(processor, messages: list[dict], images: Sequence = (), *, reply: str | None = None):
    """A Group of the chat so far: a prompt, or with ``reply`` the assistant's words appended."""
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    text += reply or ""
    if images:
        data = processor(text=[text], images=list(images), return_tensors="pt")
        vision = {key: value for key, value in data.items() if key not in TEXT_OUTPUTS}
        return Group(data["input_ids"][0], [], vision)
    tokenizer = getattr(processor, "tokenizer", processor)
    return Group(tokenizer(text, return_tensors="pt")["input_ids"][0], [])


def row_images(row: Mapping[str, Any]) -> list:
    """The images of one data row, whichever of TRL's columns holds them."""
    own = row.get("images") or [row.get("image")]
    return [image for image in own if image is not None]


def with_placeholders(prompt: list[dict], images: Sequence) -> list[dict]:
    """The chat with one image part per image in its first user turn, as the template needs it."""
    first = next(i for i, turn in enumerate(prompt) if turn["role"] == "user")
    content = prompt[first]["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    missing = len(images) - sum(part.get("type") == "image" for part in parts)
    turn = {"role": "user", "content": [{"type": "image"}] * max(missing, 0) + parts}
    return [*prompt[:first], turn, *prompt[first + 1 :]]


def load_frozen(path: str | None, trainer) -> torch.nn.Module:
    """A frozen model from ``path``, or the trainer's policy when there is none."""
    if path is None:
        return trainer.accelerator.unwrap_model(trainer.model)
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    return model.to(trainer.accelerator.device).eval().requires_grad_(False)


class SecondPassReward(Bound):
    """A second answer from what the first completion said, scored by another reward.

    ``extract`` names the tag whose content goes on (None: the whole completion); ``prompt`` is a
    template with {content} and the data columns; ``reward`` scores the second answer.
    """

    def __init__(self, prompt: str, reward: Callable, fill: Callable, *, extract=None, model=None,
                 name="second_pass", **sampling):  # fmt: skip
        super().__init__(name, getattr(reward, "columns", ()))
        self.template, self.reward, self.fill = prompt, reward, fill
        self.extract, self.model, self.sampling = extract, model, sampling

    def bind(self, trainer) -> None:
        """Take the processor, and the policy unless a model was named."""
        processor = trainer.processing_class
        tokenizer = getattr(processor, "tokenizer", processor)

        def prompt(completion, row):
            content = completion_text(completion)
            if self.extract is not None:
                content = between(content, f"<{self.extract}>", f"</{self.extract}>")
            if not content:
                return None
            text = self.fill(self.template, {**row, "content": content})
            return encode(processor, [{"role": "user", "content": text}])

        self.inner = SecondPass(
            prompt,
            self.reward,
            lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
            model=load_frozen(self.model, trainer),
            **self.sampling,
        )


class ListenerReward(Bound):
    """The probability a frozen model gives the right choice after question and reasoning."""

    def __init__(
        self, choices: Sequence[str], *, model=None, reply="{completion}", name="listener"
    ):
        super().__init__(name, ["choice"])
        self.choices, self.model, self.reply = list(choices), model, reply

    def bind(self, trainer) -> None:
        """Take the processor and the model."""
        processor = trainer.processing_class
        tokenizer = getattr(processor, "tokenizer", processor)
        ids = [tokenizer(c, add_special_tokens=False)["input_ids"][0] for c in self.choices]

        def context(prompt, completion, row):
            images = row_images(row)
            reply = self.reply.replace("{completion}", completion_text(completion))
            return encode(processor, with_placeholders(prompt, images), images, reply=reply)

        self.inner = ChoiceProbability(load_frozen(self.model, trainer), context, ids)


class FollowUpReward(Bound):
    """FLR: positive minus negative follow-up likelihood under a frozen model."""

    def __init__(self, dimensions: Sequence[Mapping[str, Sequence[str]]], *, model=None,
                 name="follow_up"):  # fmt: skip
        super().__init__(name)
        self.dimensions, self.model = dimensions, model

    def bind(self, trainer) -> None:
        """Take the processor and the model."""
        processor = trainer.processing_class
        tokenizer = getattr(processor, "tokenizer", processor)

        def ids(text: str) -> torch.Tensor:
            return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])

        dimensions = [
            ([ids(t) for t in d["positive"]], [ids(t) for t in d["negative"]])
            for d in self.dimensions
        ]

        def context(prompt, completion, row):
            images = row_images(row)
            messages = with_placeholders(prompt, images)
            return encode(processor, messages, images, reply=completion_text(completion))

        model = load_frozen(self.model, trainer)
        self.inner = FollowUpLikelihood(model, context, dimensions)


class CoTrained(Bound):
    """Cooper: a sequence classifier scored and updated on every batch."""

    def __init__(self, path: str, rule: Callable, group_size: int, *, learning_rate: float = 1e-6,
                 name="co_trained"):  # fmt: skip
        super().__init__(name, getattr(rule, "columns", ()))
        self.path, self.rule, self.group_size = path, rule, group_size
        self.learning_rate = learning_rate

    def bind(self, trainer) -> None:
        """Load the classifier beside the policy."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        device = trainer.accelerator.device
        model = AutoModelForSequenceClassification.from_pretrained(self.path).to(device)
        tokenizer = AutoTokenizer.from_pretrained(self.path)

        def scores(texts):
            batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
            return model(**batch.to(device)).logits[:, 0]

        optimizer = torch.optim.AdamW(model.parameters(), lr=self.learning_rate)
        self.inner = CoTrainedReward(scores, self.rule, optimizer, group_size=self.group_size)


class ImplicitProcess(Bound):
    """OPRL / iStar: step rewards from a copy of the policy trained on trajectory preferences."""

    def __init__(self, rule: Callable, group_size: int, *, beta: float = 0.05,
                 learning_rate: float = 1e-6, name="implicit_process"):  # fmt: skip
        super().__init__(name, getattr(rule, "columns", ()))
        self.rule, self.group_size, self.beta = rule, group_size, beta
        self.learning_rate = learning_rate

    def bind(self, trainer) -> None:
        """Copy the policy twice: phi, which learns, and its frozen start."""
        processor = trainer.processing_class
        tokenizer = getattr(processor, "tokenizer", processor)
        policy = trainer.accelerator.unwrap_model(trainer.model)
        model, reference = _copy(policy), _copy(policy).requires_grad_(False)

        def logp(which, prompts, completions):
            groups = []
            for prompt, completion in zip(prompts, completions, strict=True):
                group = encode(processor, _text_only(prompt))
                ids = tokenizer(completion_text(completion), add_special_tokens=False)["input_ids"]
                group.completions = [torch.tensor(ids, dtype=torch.int64)]
                groups.append(group)
            return [s.logp[0] for s in score(which, groups)]

        optimizer = torch.optim.AdamW(model.parameters(), lr=self.learning_rate)
        self.inner = ImplicitProcessReward(
            model, reference, logp, self.rule, optimizer, group_size=self.group_size, beta=self.beta
        )


def _copy(model: torch.nn.Module) -> torch.nn.Module:
    """A copy that computes with its own weights.

    TRL and accelerate replace ``forward`` on the instance by a function bound to the original; a
    plain deep copy would call that one.
    """
    twin = copy.deepcopy(model)
    twin.__dict__.pop("forward", None)
    return twin


def _text_only(prompt: list[dict]) -> list[dict]:
    """The chat without image parts: the process reward reads the text of the turn."""
    turns = []
    for turn in prompt:
        content = turn["content"]
        if not isinstance(content, str):
            content = "".join(p["text"] for p in content if p.get("type") == "text")
        turns.append({"role": turn["role"], "content": content})
    return turns
