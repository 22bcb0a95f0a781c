"""Time of each part of a training step, measured from outside: the step itself is unchanged."""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# The parts of a step, in order.
DATA, TO_DEVICE, AUGMENTATION = "data", "host_to_device", "augmentation"
TEACHER, STUDENT, LOSS, BACKWARD = "teacher", "student_forward", "loss", "backward"
OPTIMIZER, EMA, OTHER = "optimizer", "ema", "other"
INPUT = (DATA, TO_DEVICE, AUGMENTATION)
PARTS = (*INPUT, TEACHER, STUDENT, LOSS, BACKWARD, OPTIMIZER, EMA, OTHER)


class Timeline:
    """Marks along a step; the time from a mark to the next belongs to the mark's part.

    So the parts add up to the step. On a GPU marks are CUDA events, which do not synchronize: the
    times are those of the device, and idle time counts for the part whose host code causes it.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def mark(self, part: str) -> None:
        """Let the time from now on belong to `part`."""
        moment: Any
        if self._on_gpu:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        self._marks.append((part, moment))

    @contextmanager
    def interrupted(self) -> Iterator[None]:
        """Return to the part of the last mark at the end, whatever is marked meanwhile."""
        part = self._marks[-1][0] if self._marks else OTHER
        yield
        self.mark(part)

    def take(self) -> dict[str, float]:
        """Seconds of every part from the first mark until now; clears the marks."""
        self.mark(OTHER)
        marks, self._marks = self._marks, []
        if self._on_gpu:
            torch.cuda.synchronize()
        seconds = dict.fromkeys(PARTS, 0.0)
        for (part, begin), (_, end) in itertools.pairwise(marks):
            spent = begin.elapsed_time(end) / 1e3 if self._on_gpu else end - begin
            seconds[part] += spent
        return seconds


class TimedProxy:
    """Wraps an object of a step, and marks the timeline when the step calls it."""

    def __init__(
        self, inner: Any, timeline: Timeline, methods: Mapping[str, str], *, called: str = OTHER
    ) -> None:
        """`methods` maps method names to parts; `called` is the part of a call of the object."""
        self._inner, self._timeline = inner, timeline
        self._methods, self._called = methods, called

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Mark, and call the object."""
        self._timeline.mark(self._called)
        return self._inner(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        return self._timed(value, self._methods[name]) if name in self._methods else value

    def _timed(self, method: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._timeline.mark(part)
            result = method(*args, **kwargs)
            self._timeline.mark(OTHER)
            return result

        return timed


def watch_pair(student: Any, teacher: Any, timeline: Timeline) -> tuple[Any, Any]:
    """Student and teacher for `train_step`, whose calls mark the timeline.

    teacher: `begin` and `targets`, its forward over the global crops, Sinkhorn-Knopp, and the
        softmax of its logits.
    student_forward: the call of the student until its backbone is done.
    loss: from there to the backward: head, prototypes and loss.
    backward: `backward`, including DeepSpeed's reduction of gradients.
    optimizer: `step`: clipping, AdamW, weights in the compute type and their gather.
    ema: `update`: EMA, weights of the teacher's forward and their gather, the center.
    """

    def end_of_backbone(_module: nn.Module, _args: Any, _output: Any) -> None:
        timeline.mark(LOSS)

    student.network.backbone.register_forward_hook(end_of_backbone)
    methods = {"backward": BACKWARD, "step": OPTIMIZER}
    return (
        TimedProxy(student, timeline, methods, called=STUDENT),
        TimedProxy(teacher, timeline, {"begin": TEACHER, "targets": TEACHER, "update": EMA}),
    )
