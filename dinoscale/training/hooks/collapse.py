"""Detect the collapses of DINO from the teacher's targets alone.

Shape letters: K prototypes, N = 2 x images of a step, the rows p of the targets.

    h     = mean over rows of H(p)         entropy of a target
    H_m   = H(mean over rows of p)         entropy of the mean target
    I     = H_m - h                        mutual information of targets and images
    share = max_k of mean over rows of p   share of the strongest prototype in the mean target

Uniform collapse: all targets are equal and flat, so I -> 0 and h -> ln K. One-hot collapse: one
prototype wins for nearly all images, so the share -> 1; I -> 0 only later, because a few images
escape for long. Constant collapse: all targets are equal, so I -> 0, but the outputs move faster
than the center, so that h can be anything; it may turn into one of the other two. Equal rows have
I = 0 for every N and K, and few rows do not increase it, so the limits below need not scale with
the batch or with K; I is at most ln(min(N, K)).

Targets of masked patches are watched apart, with the same signs, N being their number.

Measured with K = 128, N = 128 on the quickstart and variants of it (nats):
    run                                     signs                                         alarm
    unchanged, 625 steps                    I >= 0.19 (step 133), share <= 0.22           none
    no centering                            share > 0.5 at step 31, > 0.9 at 45           60
    no centering from step 120              share > 0.5 at 141; I 0.36 still at 199       170
    center_momentum 0.999                   share > 0.5 at 31, > 0.9 at 47                60
    center_momentum 0.99                    share > 0.5 from 42 to 110, 3 winners of 128  75
    teacher_temp 0.07, 0.1, 0.3             I < 0.05 at 65, 46, 12                        95, 75, 40
    teacher_temp 0.3 from step 120          I < 0.05 at 120, 0.0005 at 169                150
    no batch norm in the head               I 0.44 at 0, < 0.05 at 13, 0.0001 at 100      75
    the same, lr / 20, m 0.95, warm-up 100  I < 0.05 at 59, 0.004 at 149; h 2 to 4        150
An untrained ViT-S/16 with K = 8192 has I = 0.48 at teacher_temp 0.04, 0.18 at 0.07 (drawn images).
"""

import math
from dataclasses import dataclass

OBSERVE_EVERY = 5  # steps

_NO_INFORMATION = 0.05  # nats; a quarter of the lowest value in a healthy run
_DOMINANCE = 0.5  # share; more than twice the highest value in a healthy run
_SPREAD = 0.8  # of ln K; equal targets with h above it count as uniform
_CLEARED = 2.0  # factor beyond a limit at which its alarm may be raised again
_HELD = 25  # steps for which a sign has to persist: half of the 50 within which an alarm is due
_SETTLING = 25  # steps without a verdict after the start, the warm-up and frozen prototypes
_GROWTH = 1.5  # information that grows by this factor within _HELD steps is rising, not lost
_LEARNED = 0.2  # nats; above it and twice the lowest so far, the targets have learned something

_ONE_HOT = "one-hot collapse: one prototype wins for most images"
_UNIFORM = "uniform collapse: every image gets the same, evenly spread target"
_CONSTANT = "constant collapse: every image gets the same target, which the center only follows"
_RATE_REMEDY = (
    "lower optim.lr, raise optim.warmup_epochs, dino.momentum, dino.freeze_last_layer_epochs or"
    " train.batch_size; a small network may need head.batch_norm=true"
)


@dataclass(frozen=True)
class Reading:
    """The targets of one step over all ranks, entropies in nats.

    Attributes:
        loss: mean cross-entropy.
        teacher_entropy: h.
        mean_target_entropy: H_m.
        share: of the strongest prototype in the mean target, 0 to 1.
        teacher_temp: temperature of the targets.
    """

    loss: float
    teacher_entropy: float
    mean_target_entropy: float
    share: float
    teacher_temp: float

    @property
    def information(self) -> float:
        """I = H_m - h in nats; not negative except by rounding."""
        return self.mean_target_entropy - self.teacher_entropy


@dataclass(frozen=True)
class Alarm:
    """A collapse: `kind` as in the module's docstring; `text` gives the signs and a remedy."""

    kind: str
    text: str


class CollapseMonitor:
    """Raises alarms from the targets' statistics: no clock, no files, no communication.

    The information is judged only after the warm-up and once the prototypes move, because a new
    network may give nearly the same target for every image. It is judged at once if the targets
    have already learned something, or if the teacher is not sharper than the student, whose targets
    never become informative.
    """

    def __init__(
        self,
        *,
        num_prototypes: int,
        student_temp: float,
        center_momentum: float,
        warmup_steps: int,
        freeze_steps: int,
        tokens: str = "",
    ) -> None:
        """Watch a run.

        Args:
            num_prototypes: K.
            student_temp: temperature of the student.
            center_momentum: of the center; for the text.
            warmup_steps: steps of learning-rate warm-up.
            freeze_steps: steps with frozen prototypes.
            tokens: whose targets these are, where there are several kinds; for the text.
        """
        self._tokens = f"{tokens}: " if tokens else ""
        self._max_entropy, self._student_temp = math.log(num_prototypes), student_temp
        self._center_momentum = center_momentum
        self._settled_step = max(warmup_steps, freeze_steps) + _SETTLING
        self._unfreezing = range(freeze_steps, freeze_steps + 2 * _SETTLING)
        self._lowest = math.inf  # information since the center took hold
        self._learned = False
        self._since: dict[str, tuple[int, float]] = {}  # sign -> step and information at its start
        self._raised: set[str] = set()  # signs

    def observe(self, step: int, reading: Reading) -> Alarm | None:
        """Judge the targets after `step` steps; call it at least every `_HELD` steps.

        Returns:
            An alarm once a sign of collapse has persisted for 25 steps; None in a healthy run, and
            while the sign of an earlier alarm has not cleared.
        """
        information, share = reading.information, reading.share
        if not (math.isfinite(information) and math.isfinite(share)):
            return None  # a skipped step
        if step >= 2 * _SETTLING:  # before, information rises as the center takes hold
            self._lowest = min(self._lowest, information)
            self._learned |= information >= max(_LEARNED, 2 * self._lowest)
        if share < _DOMINANCE / _CLEARED:
            self._raised.discard("dominated")
        if information > _NO_INFORMATION * _CLEARED:
            self._raised.discard("equal")
        # The center starts at 0; until it has followed the outputs, a strong prototype is normal.
        dominated = share >= _DOMINANCE and step >= _SETTLING
        equal = information < _NO_INFORMATION and self._may_judge_equal(step, reading.teacher_temp)
        dominated_long = self._has_held("dominated", step, information, seen=dominated)
        equal_long = self._has_held("equal", step, information, seen=equal)
        if dominated_long:
            return self._alarm("dominated", "one_hot", reading)
        if equal_long and not dominated:
            spread = reading.teacher_entropy >= _SPREAD * self._max_entropy
            return self._alarm("equal", "uniform" if spread else "constant", reading)
        return None

    def _may_judge_equal(self, step: int, teacher_temp: float) -> bool:
        return (
            teacher_temp >= self._student_temp
            or step >= self._settled_step
            or (self._learned and step not in self._unfreezing)
        )

    def _has_held(self, sign: str, step: int, information: float, *, seen: bool) -> bool:
        if not seen:
            self._since.pop(sign, None)
            return False
        begin, at_begin = self._since.setdefault(sign, (step, information))
        if step - begin < _HELD:
            return False
        if sign == "equal" and information > _GROWTH * at_begin:
            self._since[sign] = step, information  # still rising: wait again
            return False
        return True

    def _alarm(self, sign: str, kind: str, reading: Reading) -> Alarm | None:
        if sign in self._raised:
            return None
        self._raised.add(sign)
        meaning, remedy = {
            "one_hot": (_ONE_HOT, self._center_remedy()),
            "uniform": (_UNIFORM, self._sharpening_remedy(reading.teacher_temp)),
            "constant": (_CONSTANT, f"The outputs outrun the center: {_RATE_REMEDY}"),
        }[kind]
        seen = (
            f"teacher entropy {reading.teacher_entropy:.3f} of at most {self._max_entropy:.3f}"
            f" nats, loss {reading.loss:.3f}, KL {reading.loss - reading.teacher_entropy:.3f},"
            f" targets carry {max(reading.information, 0):.4f} nats about their image, the"
            f" strongest prototype has a share of {100 * reading.share:.1f} %"
        )
        again = "Then restart from a checkpoint before this step, or from scratch"
        return Alarm(kind, f"{self._tokens}{meaning} ({seen}). {remedy}. {again}")

    def _center_remedy(self) -> str:
        return (
            f"The center does not keep up: lower dino.center_momentum (now"
            f" {self._center_momentum:g}; 0.9 is usual, from 0.999 on it hardly acts)."
            " If it is 0.9 or less, lower optim.lr or raise dino.momentum"
        )

    def _sharpening_remedy(self, teacher_temp: float) -> str:
        below = "it has to be lower; " if teacher_temp >= self._student_temp else ""
        return (
            f"Sharpening is too weak: lower dino.teacher_temp (now {teacher_temp:g} against"
            f" dino.student_temp {self._student_temp:g}; {below}0.04 is usual) and"
            " dino.warmup_teacher_temp, or raise dino.warmup_teacher_temp_epochs. If the"
            f" temperature is right: {_RATE_REMEDY}"
        )
