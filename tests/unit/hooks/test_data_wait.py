import pytest

from dinoscale.training.hooks.data_wait import DataWait


def _wait(*, num_workers: int = 2, cores: int = 16, on_cpu: bool = False) -> DataWait:
    return DataWait(num_workers=num_workers, cores=cores, ranks_here=2, on_cpu=on_cpu)


def test_a_long_wait_is_warned_about_once_and_not_after_the_start() -> None:
    wait = _wait()
    assert wait.observe(0.9) is None  # the workers have only begun
    assert wait.observe(0.1) is None
    said = wait.observe(0.4)
    assert said is not None
    assert "no data for 40% of the time" in said
    assert "raise data.num_workers from 2 to 8" in said
    assert "dinoscale bench data" in said
    assert wait.observe(0.9) is None


def test_the_first_interval_after_a_rollback_is_ignored() -> None:
    wait = _wait()
    wait.observe(0.0)
    wait.restarted()
    assert wait.observe(0.9) is None
    assert wait.observe(0.9) is not None


@pytest.mark.parametrize("num_workers", [8, 9])
def test_no_more_workers_are_advised_than_cores(num_workers: int) -> None:
    wait = _wait(num_workers=num_workers)
    wait.observe(0.0)
    said = wait.observe(0.5)
    assert said is not None
    assert "raise" not in said
    assert "uses all 16 available cores" in said


def test_a_cpu_without_data_workers_is_not_warned() -> None:
    alone, gpu = _wait(num_workers=0, on_cpu=True), _wait(num_workers=0)
    for wait in (alone, gpu):
        wait.observe(0.0)
    assert alone.observe(0.9) is None
    assert gpu.observe(0.9) is not None
