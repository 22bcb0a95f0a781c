"""Measure the teacher between two steps; a failure costs the measurement, not the run."""

import logging
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from dinoscale.engine.teacher import Teacher
from dinoscale.errors import DinoscaleError, LostPeerError, OutOfStepError
from dinoscale.runtime import distributed
from dinoscale.runtime.launcher_env import Process
from dinoscale.runtime.preemption import StopRequest
from dinoscale.runtime.watchdog import Watchdog
from dinoscale.training.hooks.events import Events

T = TypeVar("T")
Measure = Callable[[nn.Module, torch.device, Callable[[], None]], T]

log = logging.getLogger(__name__)


class Measuring:
    """Measures the teacher on all ranks together.

    Attributes:
        asked_to_stop: a rank was asked to stop during a measurement, and all ranks know.
    """

    def __init__(
        self, process: Process, watchdog: Watchdog, stop: StopRequest, events: Events
    ) -> None:
        """Args: those of the run."""
        self._process, self._watchdog, self._stop = process, watchdog, stop
        self._events = events
        self.asked_to_stop = False

    def attempt(self, what: str, measure: Measure[T], teacher: Teacher, done: int) -> T | None:
        """Measure the teacher's backbone; None, on every rank, if that failed on any.

        Args:
            what: is measured, in words.
            measure: takes the backbone, whole on every rank, its device, and what to call after
                each batch, so that a request to stop ends the measurement on all ranks.
            teacher: after `done` steps.
            done: steps.

        Raises:
            LostPeerError: another rank ended.
            OutOfStepError: the others wait for this one to end.
        """
        self._watchdog.progress(f"measuring {what} after step {done}")
        try:
            backbone = teacher.plain_backbone()
            return distributed.together(
                partial(measure, backbone, self._process.device, self._on_batch)
            )
        except (LostPeerError, OutOfStepError):
            raise
        except Exception as error:  # raised on all ranks: its own error, or that of another rank
            self.asked_to_stop |= any(distributed.gather_objects(self._stop.asked))
            self._events.write(done, f"no {what}", reason=str(error))
            foreign = None if isinstance(error, DinoscaleError) else error
            if self._process.rank == 0 or foreign:
                log.warning("no %s after step %d: %s", what, done, error, exc_info=foreign)
            return None

    def _on_batch(self) -> None:
        """Called between two batches; a request to stop ends the measurement on all ranks.

        Raises:
            PreemptedError: this rank was asked to stop.
        """
        self._watchdog.heartbeat()
        self._stop.check()
