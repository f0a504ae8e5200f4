from jobs.stage_2_selection.ray_runner import actor_pool, default_num_actors
from selectmoe.config.selection import SelectConfig
from selectmoe.paths import EMBEDDED_SELECTOR
from selectmoe.selection.backends import LocalBackend

GIGABYTES = 1e9
EMBEDDED = str(EMBEDDED_SELECTOR)


def test_there_is_one_actor_for_each_gpu_or_else_for_each_cpu():
    resources = {"CPU": 8.0, "memory": 64 * GIGABYTES}
    with_gpus = {**resources, "GPU": 2.0}
    assert default_num_actors(SelectConfig(), EMBEDDED, with_gpus, has_gpus=True) == 2
    assert default_num_actors(SelectConfig(), EMBEDDED, resources, has_gpus=False) == 8


def test_actors_of_several_threads_share_the_cpus():
    config = SelectConfig(num_threads_per_actor=3)
    resources = {"CPU": 8.0, "memory": 64 * GIGABYTES}
    assert default_num_actors(config, EMBEDDED, resources, has_gpus=False) == 2


def test_no_more_actors_than_memory_holds_models(tmp_path, caplog):
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(14_000_000_000)  # sparse: OLMoE-1B-7B in bfloat16
    (tmp_path / "config.json").write_text('{"model_type": "select_moe"}')
    with caplog.at_level("INFO"):
        num_actors = default_num_actors(
            SelectConfig(), str(tmp_path), {"CPU": 64.0, "memory": 90 * GIGABYTES}, has_gpus=False
        )
    assert num_actors == 3
    assert "3 actors instead of 64: the cluster's 90.0 GB of memory hold no more" in caplog.text


def bounds_of(num_actors, now, grown=None, *, num_shards=1_000):
    config = SelectConfig(num_actors=num_actors)
    memory = {"memory": 900 * GIGABYTES}
    pool = actor_pool(config, LocalBackend(config), now | memory, (grown or now) | memory)
    return pool.limited_to(num_shards)


def test_a_pool_begins_with_what_the_cluster_has_and_grows_within_its_bounds():
    assert bounds_of(None, {"CPU": 2.0}) == (1, 2, 1_000)
    assert bounds_of(4, {"CPU": 2.0}) == (1, 2, 4)
    assert bounds_of(1, {"CPU": 2.0}) == (1, 1, 1)
    assert bounds_of("3:8", {"CPU": 2.0}) == (3, 3, 8)
    assert bounds_of(None, {"CPU": 2.0}, num_shards=1) == (1, 1, 1)


def test_a_cluster_that_will_have_gpus_scores_on_them_from_the_beginning():
    config = SelectConfig()
    pool = actor_pool(config, LocalBackend(config), {"CPU": 0.0}, {"CPU": 32.0, "GPU": 4.0})
    assert pool.num_gpus == 1
    assert pool.limited_to(1_000) == (1, 1, 1_000)
