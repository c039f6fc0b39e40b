"""A ring of the last N transitions: one preallocated array of records, one gather for any number of minibatches.

Lin, 1992; notes, section 7.6.3. All fields of a transition lie side by side in one record, so `gather` copies each
record once, whatever the number of fields, and hands out strided views.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from etude.blocks.acting.memory import afford


class Replay:
    """Keeps exactly the last `capacity` rows added.

    `fields` gives one example row a field: ``Replay(1000, state=np.zeros(4, np.float32), action=0, terminated=False)``.
    Shapes and dtypes are taken from the examples (Python numbers are int64, float64 and bool) and kept.
    """

    def __init__(self, capacity: int, **fields: ArrayLike) -> None:
        if capacity < 1:
            raise ValueError(f"a replay buffer needs room for at least 1 row, got {capacity}")
        examples = {name: np.asarray(example) for name, example in fields.items()}
        record = np.dtype([(name, item.dtype, item.shape) for name, item in examples.items()], align=True)
        afford(f"a replay buffer of {capacity:,} transitions (--buffer)", capacity * record.itemsize)
        self._rows = np.zeros(capacity, record)
        self._columns = {name: self._rows[name] for name in examples}
        self._next = self._size = 0

    @property
    def capacity(self) -> int:
        """The most rows it holds."""
        return len(self._rows)

    def __len__(self) -> int:
        return self._size

    def add(self, **fields: NDArray[Any]) -> None:
        """Append M rows (every field (M, *shape)); the oldest give way. M must not exceed the capacity."""
        count = len(next(iter(fields.values())))
        if fields.keys() != self._columns.keys() or any(len(rows) != count for rows in fields.values()):
            raise ValueError(f"add takes equally many rows of each of {', '.join(self._columns)}")
        if count > self.capacity:
            raise ValueError(f"{count} rows at once do not fit in a buffer of {self.capacity}")
        end = self._next + count
        for name, rows in fields.items():
            column = self._columns[name]
            if end <= self.capacity:
                column[self._next : end] = rows
            else:
                room = self.capacity - self._next
                column[self._next :], column[: end - self.capacity] = rows[:room], rows[room:]
        self._next = end % self.capacity
        self._size = min(self._size + count, self.capacity)

    def gather(self, index: NDArray[np.int64] | Tensor, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The rows at `index` (*I) as {field: (*I, *shape)}: copies, of the dtype added. Row 0 is the oldest.

        Index (K, B) gives K minibatches in one go. Indices must lie in [0, len).
        """
        index = np.asarray(index)
        if self._size == self.capacity:
            index = (index + self._next) % self.capacity
        rows = self._rows.take(index)
        fields = {name: torch.from_numpy(rows[name]) for name in self._columns}
        return fields if str(device) == "cpu" else {name: field.to(device) for name, field in fields.items()}

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> NDArray[np.int64]:
        """Indices of the given shape, uniform over the rows held, with replacement."""
        return torch.randint(self._size, shape, generator=generator).numpy()

    def state_dict(self) -> dict[str, Any]:
        """The rows held, oldest first, field by field."""
        order = (np.arange(self._size) + (self._next if self._size == self.capacity else 0)) % self.capacity
        return {name: column[order] for name, column in self._columns.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hold exactly the rows of `state`, in their order."""
        self._next = self._size = 0
        self.add(**state)


class Screens(Replay):
    """The same for stacks of screens, which share most of theirs: of each transition the newest screen of both states is kept.

    States are images (C, H, W) uint8 of which the last `planes` are new. `count` worlds give one row each in every `add`,
    always in the same order, with ``state, action, reward, next_state, terminated, truncated``; the older screens are those
    of the same world's rows before, back to the one with which the episode began.
    """

    def __init__(self, capacity: int, count: int, shape: tuple[int, ...], planes: int) -> None:
        self._count, self._stack, self._planes = count, shape[0] // planes, planes
        if self._stack * planes != shape[0]:
            raise ValueError(f"{shape[0]} planes are no stack of screens of {planes}")
        if capacity < (self._stack + 1) * count:
            raise ValueError(
                f"a replay buffer for {count} worlds needs room for {(self._stack + 1) * count} rows at least"
            )
        screen = np.zeros((planes, *shape[1:]), np.uint8)
        fields: dict[str, Any] = {"state": screen, "next_state": screen, "action": np.int64(0), "reward": np.float32(0)}
        super().__init__(capacity, **fields, terminated=False, truncated=False, age=np.uint8(0))
        self._age = np.zeros(count, np.uint8)

    def add(self, **fields: NDArray[Any]) -> None:
        """Append one row of each world."""
        if "age" in fields:  # those of a checkpoint
            super().add(**fields)
            return
        if len(fields["reward"]) != self._count:
            raise ValueError(f"add takes one row of each of the {self._count} worlds")
        new = {name: fields[name][:, -self._planes :] for name in ("state", "next_state")}
        super().add(**fields | new, age=self._age)
        over = fields["terminated"] | fields["truncated"]
        self._age = np.where(over, 0, np.minimum(self._age + 1, self._stack - 1)).astype(np.uint8)

    def begin(self) -> None:
        """Every world is at the beginning of an episode: nothing before it is seen."""
        self._age[:] = 0

    def gather(self, index: NDArray[np.int64] | Tensor, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The rows at `index` (*I) as {field: (*I, *shape)}, with whole states again. Indices as `sample` gives them."""
        index = np.asarray(index)
        place = (index + self._next) % self.capacity if self._size == self.capacity else index
        columns, age = self._columns, self._columns["age"][place].astype(np.int64)
        back = np.minimum(np.arange(self._stack)[::-1], age[..., None])  # (*I, stack): oldest first
        older = (place[..., None] - back * self._count) % self.capacity
        state = columns["state"][older]  # (*I, stack, planes, H, W)
        # what was seen before the screen reached: all but the oldest of the state's, or its first again
        reached = np.concatenate([state[..., 1:, :, :, :], columns["next_state"][place][..., None, :, :, :]], -4)
        shape = (*index.shape, self._stack * self._planes, *state.shape[-2:])
        found = {"state": state.reshape(shape), "next_state": reached.reshape(shape)}
        found |= {name: columns[name][place] for name in ("action", "reward", "terminated")}
        return {name: torch.from_numpy(np.ascontiguousarray(field)).to(device) for name, field in found.items()}

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> NDArray[np.int64]:
        """Indices of the given shape, uniform over the rows whose older screens are still held, with replacement."""
        lost = (self._stack - 1) * self._count if self._size == self.capacity else 0
        return torch.randint(lost, self._size, shape, generator=generator).numpy()

    def state_dict(self) -> dict[str, Any]:
        """The rows held, oldest first, and how far each world is into its episode."""
        return {"rows": super().state_dict(), "age": self._age.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hold exactly the rows of `state`, in their order."""
        super().load_state_dict(state["rows"])
        self._age = np.array(state["age"])
