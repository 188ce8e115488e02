"""What a network is told besides the noise: class labels, float vectors, and whatever a model of your own needs.

A plain label tensor, float32 [N, K], works everywhere a `Condition` does: the functions of this module take either and
return the same kind. A network whose condition is not a tensor (text embeddings, several tensors) implements the
protocol; classifier-free guidance, independent-condition guidance and batching then work unchanged.
"""

import difflib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeAlias, cast, overload, runtime_checkable

import torch

from edm2kit.torch_utils.rng import StackedGenerator


@runtime_checkable
class Condition(Protocol):
    """The conditions of N images. Every method returns a new condition and leaves this one unchanged.

    Example: `isinstance(ClassLabels.of([3, 7], 10), Condition)` is true.
    """

    def __len__(self) -> int:
        """N, the number of images."""
        ...

    def __getitem__(self, rows: Any) -> Self:
        """The conditions of some images: `rows` is a slice, a bool mask [N] or an index tensor [M]."""
        ...

    def null(self) -> Self:
        """The condition that says nothing, N times: what classifier-free guidance leads away from."""
        ...

    def others(self, rng: StackedGenerator, include_own: bool = False) -> Self:
        """For each image a condition drawn at random; its own one is excluded unless `include_own`."""
        ...

    def cat(self, *more: Self) -> Self:
        """This condition followed by those of further images."""
        ...

    def repeat(self, times: int) -> Self:
        """The N conditions `times` times, one block after another."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        ...


ConditionLike: TypeAlias = torch.Tensor | Condition | None


@dataclass(frozen=True)
class ClassLabels:
    """One class per image: `one_hot` float32 [N, K]. A row of zeros means no class.

    Example: `ClassLabels.of([3, 7], num_classes=10)`.
    """

    one_hot: torch.Tensor

    def __repr__(self) -> str:
        return f"ClassLabels: {len(self.one_hot)} images, {self.one_hot.shape[1]} classes"

    @classmethod
    def of(cls, classes: Sequence[int] | torch.Tensor, num_classes: int) -> "ClassLabels":
        """Labels from class indices [N]. Raises ValueError if an index is not in [0, num_classes)."""
        indices = torch.as_tensor(classes, dtype=torch.int64)
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < num_classes:
            raise ValueError(f"class indices must be from 0 to {num_classes - 1}, got {indices.tolist()[:8]}")
        return cls(torch.nn.functional.one_hot(indices, num_classes).float())

    def __len__(self) -> int:
        return len(self.one_hot)

    def __getitem__(self, rows: Any) -> "ClassLabels":
        return ClassLabels(self.one_hot[rows])

    def null(self) -> "ClassLabels":
        return ClassLabels(torch.zeros_like(self.one_hot))

    def others(self, rng: StackedGenerator, include_own: bool = False) -> "ClassLabels":
        return ClassLabels(_other_classes(self.one_hot, rng, include_own))

    def cat(self, *more: "ClassLabels") -> "ClassLabels":
        return ClassLabels(torch.cat([self.one_hot, *(labels.one_hot for labels in more)]))

    def repeat(self, times: int) -> "ClassLabels":
        return ClassLabels(self.one_hot.repeat(times, 1))

    def to(self, device: torch.device | str) -> "ClassLabels":
        return ClassLabels(self.one_hot.to(device))


@dataclass(frozen=True)
class FloatVectors:
    """One vector of K numbers per image: `values` float32 [N, K]. A row of zeros says nothing.

    `pool` [M, K] holds the vectors that `others` draws from, usually those of the training set.

    Example: `FloatVectors(torch.rand(4, 16), pool=dataset_vectors)`.
    """

    values: torch.Tensor
    pool: torch.Tensor | None = None

    def __repr__(self) -> str:
        return f"FloatVectors: {len(self.values)} vectors of {self.values.shape[1]} numbers"

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: Any) -> "FloatVectors":
        return FloatVectors(self.values[rows], self.pool)

    def null(self) -> "FloatVectors":
        return FloatVectors(torch.zeros_like(self.values), self.pool)

    def others(self, rng: StackedGenerator, include_own: bool = False) -> "FloatVectors":
        """Vectors drawn from `pool`. An own vector cannot be recognised, so `include_own` makes no difference.

        Raises ValueError if there is no pool.
        """
        if self.pool is None:
            raise ValueError("independent conditions need a pool of vectors to draw from: FloatVectors(values, pool)")
        drawn = rng.randint(len(self.pool), size=[len(self)]).to(self.pool.device)
        return FloatVectors(self.pool[drawn].to(self.values), self.pool)

    def cat(self, *more: "FloatVectors") -> "FloatVectors":
        return FloatVectors(torch.cat([self.values, *(vectors.values for vectors in more)]), self.pool)

    def repeat(self, times: int) -> "FloatVectors":
        return FloatVectors(self.values.repeat(times, 1), self.pool)

    def to(self, device: torch.device | str) -> "FloatVectors":
        return FloatVectors(self.values.to(device), None if self.pool is None else self.pool.to(device))


def condition_tensor(condition: ConditionLike) -> torch.Tensor | None:
    """The tensor [N, K] that a network with `label_dim` takes; None if there is no condition.

    Raises ValueError for a condition of another kind (a text prompt, say).
    """
    if condition is None or isinstance(condition, torch.Tensor):
        return condition
    if isinstance(condition, ClassLabels):
        return condition.one_hot
    if isinstance(condition, FloatVectors):
        return condition.values
    raise ValueError(f"this network takes class labels or vectors [N, K]; got a {type(condition).__name__}")


@overload
def null_condition(condition: torch.Tensor) -> torch.Tensor: ...
@overload
def null_condition(condition: Condition) -> Condition: ...
def null_condition(condition: torch.Tensor | Condition) -> torch.Tensor | Condition:
    """The condition that says nothing, for as many images: zeros for a tensor, `condition.null()` otherwise."""
    return torch.zeros_like(condition) if isinstance(condition, torch.Tensor) else condition.null()


@overload
def other_conditions(condition: torch.Tensor, rng: StackedGenerator, include_own: bool = False) -> torch.Tensor: ...
@overload
def other_conditions(condition: Condition, rng: StackedGenerator, include_own: bool = False) -> Condition: ...
def other_conditions(
    condition: torch.Tensor | Condition, rng: StackedGenerator, include_own: bool = False
) -> torch.Tensor | Condition:
    """For each image another condition drawn at random. A plain tensor is taken for one-hot class labels [N, K]."""
    if isinstance(condition, torch.Tensor):
        return _other_classes(condition, rng, include_own)
    return condition.others(rng, include_own)


def cat_conditions(conditions: Sequence[ConditionLike]) -> ConditionLike:
    """The conditions of several batches as one. Raises ValueError if some are missing or of different kinds."""
    kinds = [type(condition).__name__ for condition in conditions]
    if len(set(kinds)) != 1:
        raise ValueError(f"conditions of different kinds cannot form one batch: {', '.join(kinds)}")
    if conditions[0] is None:
        return None
    if isinstance(conditions[0], torch.Tensor):
        return torch.cat(cast(list[torch.Tensor], list(conditions)))
    first, *more = cast(list[Condition], list(conditions))
    return first.cat(*more)


def repeat_condition(condition: ConditionLike, times: int) -> ConditionLike:
    """The conditions of a batch `times` times, one block after another; None stays None."""
    if condition is None:
        return None
    if isinstance(condition, torch.Tensor):
        return condition.repeat(times, *[1] * (condition.ndim - 1))
    return condition.repeat(times)


def _other_classes(one_hot: torch.Tensor, rng: StackedGenerator, include_own: bool) -> torch.Tensor:
    n, num_classes = one_hot.shape
    own = one_hot.argmax(dim=1)
    if include_own:
        drawn = rng.randint(num_classes, size=[n]).to(own)
    elif num_classes == 1:
        return one_hot  # there is no other class
    else:
        drawn = rng.randint(num_classes - 1, size=[n]).to(own)
        drawn = drawn + (drawn >= own)  # skips the own class, all others equally likely
    return torch.nn.functional.one_hot(drawn, num_classes).to(one_hot.dtype)


ALL_CLASSES = ""  # what stands for all classes of the network in `parse_classes`


def class_named(name: str, label_dim: int, names: Sequence[str] | None) -> int:
    """The index of the class called `name`; raises ValueError, with the closest name, if there is none."""
    if names is None:
        raise ValueError(f"class {name!r}: the snapshot names no classes; use numbers from 0 to {label_dim - 1}")
    found = [k for k, other in enumerate(names) if other == name]
    if not found:  # systems differ in how they store an accent: as part of the letter, or after it
        composed = unicodedata.normalize("NFC", name)
        found = [k for k, other in enumerate(names) if unicodedata.normalize("NFC", other) == composed]
    if len(found) > 1:
        numbers = ", ".join(map(str, found))
        raise ValueError(f"several classes are called {name!r}; use the number of one of them: {numbers}")
    if found:
        return found[0]
    nearest = [other for other in names if other.casefold() == name.casefold()]
    nearest = nearest or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if nearest:
        raise ValueError(f"class {name!r} is unknown; did you mean {nearest[0]!r}?")
    raise ValueError(f"class {name!r} is unknown; available: {', '.join(names[:8])}, ...")


@dataclass(frozen=True, eq=False)
class TextPrompts:
    """Text prompts, encoded once: image n has the prompt `texts[rows[n]]`, and row K is the null prompt.

    `encodings` holds what text encoders made of the K texts and of the null prompt (the empty or a negative one): for
    each network by name, tensors [K + 1, ...] by the name that the network knows them by. Networks whose encoders
    differ each have an entry. `rows` is int64 [N] and stays on the CPU.

    Example: `prompts = TextPrompts(texts, {"net": {"prompt_embeds": embeddings}}, torch.arange(len(texts)))`, then
    `prompts[torch.tensor([0, 0, 1])]` for two images of the first prompt and one of the second.
    """

    texts: tuple[str, ...]
    encodings: Mapping[str, Mapping[str, torch.Tensor]]
    rows: torch.Tensor

    def __post_init__(self) -> None:
        for name, tensors in self.encodings.items():
            for key, tensor in tensors.items():
                if len(tensor) != len(self.texts) + 1:
                    raise ValueError(
                        f"{key} for {name} has {len(tensor)} rows; expected {len(self.texts) + 1}, one per prompt and "
                        "one for the null prompt"
                    )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Any) -> "TextPrompts":
        return self._at(self.rows[rows.cpu() if isinstance(rows, torch.Tensor) else rows])

    def null(self) -> "TextPrompts":
        return self._at(torch.full_like(self.rows, len(self.texts)))

    def others(self, rng: StackedGenerator, include_own: bool = False) -> "TextPrompts":
        """For each image another prompt of the set, or any if `include_own`. Raises ValueError if there is only one."""
        count = len(self.texts)
        if count < 2:
            raise ValueError("another prompt needs at least two prompts to choose from; give more with --prompts")
        drawn = rng.randint(count if include_own else count - 1, size=[len(self)]).cpu()
        if not include_own:
            drawn = drawn + (drawn >= self.rows).long()
        return self._at(drawn)

    def cat(self, *more: "TextPrompts") -> "TextPrompts":
        """Raises ValueError for prompts of another set."""
        if any(other.encodings is not self.encodings for other in more):
            raise ValueError("prompts of different sets cannot form one batch; encode them together")
        return self._at(torch.cat([self.rows, *(other.rows for other in more)]))

    def repeat(self, times: int) -> "TextPrompts":
        return self._at(self.rows.repeat(times))

    def to(self, device: torch.device | str) -> "TextPrompts":
        """The same prompts: `encoded` moves what a call needs."""
        return self

    def encoded(self, name: str, device: torch.device | str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """What the network `name` takes for these N images, floats in `dtype`.

        Raises ValueError for an unknown name.
        """
        if name not in self.encodings:
            raise ValueError(f"the prompts are not encoded for {name!r}; encoded for: {', '.join(self.encodings)}")
        found = {}
        for key, tensor in self.encodings[name].items():
            picked = tensor[self.rows.to(tensor.device)]
            found[key] = picked.to(device, dtype if picked.is_floating_point() else None)
        return found

    def _at(self, rows: torch.Tensor) -> "TextPrompts":
        return TextPrompts(self.texts, self.encodings, rows)


def parse_classes(
    text: str | None, label_dim: int, names: Sequence[str] | None, empty: Sequence[int] = ()
) -> tuple[int, ...] | None:
    """Class indices from numbers, ranges and names separated by commas; None for None.

    ALL_CLASSES stands for all but the classes `empty`, which had no image in training. A name comes before a number:
    if a class is called 10 or 3-9, that text means this class, and a range means the numbers in it written one by one.

    Raises ValueError if the network has no classes, for an index out of range, for an unknown name or one of several
    classes, and if some numbers are names and others are indices.
    """
    if text is None:
        return None
    if label_dim == 0:
        raise ValueError("the network has no classes; leave out --class and --balanced")
    if text == ALL_CLASSES:
        return tuple(k for k in range(label_dim) if k not in set(empty))
    if names is not None and text in names:  # a name may contain a comma
        return (class_named(text, label_dim, names),)
    classes: list[int] = []
    indices: list[int] = []  # the numbers that are not names of classes
    named: list[str] = []  # and those that are
    for written in _split(text, names or ()):
        part = written if names is not None and written in names else written.strip()
        numbers = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", part)
        if numbers is None or (names is not None and part in names):
            named += [part] if numbers is not None and numbers[2] is None else []
            classes.append(class_named(part, label_dim, names))
            continue
        first, last = int(numbers[1]), int(numbers[2] or numbers[1])
        if not 0 <= last - first < label_dim:
            raise ValueError(f"class {part} is out of range; the network has classes 0 to {label_dim - 1}")
        for number in range(first, last + 1):
            if names is not None and str(number) in names:
                named.append(str(number))
                classes.append(class_named(str(number), label_dim, names))
            elif number < label_dim:
                indices.append(number)
                classes.append(number)
            else:
                raise ValueError(f"class {part} is out of range; the network has classes 0 to {label_dim - 1}")
    if named and indices:
        raise ValueError(f"in {text!r:.60}, {named[0]} is the name of a class, but {indices[0]} is not; use names only")
    return tuple(classes)


def _split(text: str, names: Sequence[str]) -> list[str]:
    """The parts of a list separated by commas, where a class may have commas in its name."""
    parts = text.split(",")
    if not any("," in name for name in names):
        return parts
    found = []
    while parts:
        end = next((end for end in range(len(parts), 1, -1) if ",".join(parts[:end]) in names), 1)
        found.append(",".join(parts[:end]))
        parts = parts[end:]
    return found
