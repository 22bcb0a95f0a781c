"""Where the time of a step goes, seen from outside: the step itself knows nothing of it."""

import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

# What a moment of a step can belong to, in the order of the step.
DATA, TO_DEVICE, AUGMENTATION = "data", "host_to_device", "augmentation"
TEACHER, STUDENT, LOSS, BACKWARD = "teacher", "student_forward", "loss", "backward"
OPTIMIZER, EMA, OTHER = "optimizer", "ema", "other"
INPUT = (DATA, TO_DEVICE, AUGMENTATION)
PARTS = (*INPUT, TEACHER, STUDENT, LOSS, BACKWARD, OPTIMIZER, EMA, OTHER)


class Timeline:
    """Marks along a step; the time after a mark belongs to its part until the next mark.

    So the parts add up to the step. On a GPU marks are events in the queue of kernels, which waits
    for nothing: the times are those of the device, and host code that keeps it idle counts for the
    part in which it does.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def mark(self, part: str) -> None:
        """From now on, time belongs to `part`."""
        moment: Any
        if self._on_gpu:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        self._marks.append((part, moment))

    def take(self) -> dict[str, float]:
        """Seconds of every part from the first mark until now; forgets the marks."""
        self.mark(OTHER)
        marks, self._marks = self._marks, []
        if self._on_gpu:
            torch.cuda.synchronize()
        seconds = dict.fromkeys(PARTS, 0.0)
        for (part, begin), (_, end) in itertools.pairwise(marks):
            spent = begin.elapsed_time(end) / 1e3 if self._on_gpu else end - begin
            seconds[part] += spent
        return seconds


class Watched:
    """Stands for an object in a step, and marks when the step calls it."""

    def __init__(
        self, inner: Any, timeline: Timeline, methods: Mapping[str, str], *, called: str = OTHER
    ) -> None:
        """`methods` are parts by method name; the time from a call of the object on is `called`."""
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
    """Student and teacher as `train_step` takes them, each of their parts on the timeline.

    teacher: `targets`, its forward over the global crops and the softmax of its logits.
    student_forward: the call of the student until its backbone is done.
    loss: from there to the backward: head, prototypes and loss, which one call may do together.
    backward: `backward`, with the reduction of gradients that DeepSpeed does in it.
    optimizer: `step`: clipping, AdamW, weights in the compute type and their gather.
    ema: `update`: the average, the weights of the teacher's forward and their gather, the center.
    """

    def end_of_backbone(_module: nn.Module, _args: Any, _output: Any) -> None:
        timeline.mark(LOSS)

    student.network.backbone.register_forward_hook(end_of_backbone)
    methods = {"backward": BACKWARD, "step": OPTIMIZER}
    return (
        Watched(student, timeline, methods, called=STUDENT),
        Watched(teacher, timeline, {"targets": TEACHER, "update": EMA}),
    )
