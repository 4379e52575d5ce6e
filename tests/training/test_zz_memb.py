import pytest

from tests.benchmarks.memory_pool import World
from tests.training import test_memory_tuning as t


@pytest.mark.parametrize("size", [1, 2])
def test_it(size, tmp_path):
    w = World(size)
    for n, c in enumerate(t.CASES):
        if c.world_size == size and c.keys == t.MUON:
            said, peak, states, left = t._compare(w, c, tmp_path / str(n))
            print(f"{said / peak - 1:+.2%} {states - left:+} of {left} {c.name} {c.keys}", flush=True)
    w.close()
