from jobs.stage_2_selection.ray_runner import default_num_actors
from selectmoe.config.selection import SelectConfig
from selectmoe.paths import EMBEDDED_SELECTOR

GIGABYTES = 1e9
EMBEDDED = str(EMBEDDED_SELECTOR)


def test_there_is_one_actor_for_each_gpu_or_else_for_each_cpu():
    resources = {"CPU": 8.0, "memory": 64 * GIGABYTES}
    assert default_num_actors(SelectConfig(), EMBEDDED, {**resources, "GPU": 2.0}) == 2
    assert default_num_actors(SelectConfig(), EMBEDDED, resources) == 8


def test_actors_of_several_threads_share_the_cpus():
    config = SelectConfig(num_threads_per_actor=3)
    assert default_num_actors(config, EMBEDDED, {"CPU": 8.0, "memory": 64 * GIGABYTES}) == 2


def test_no_more_actors_than_memory_holds_models(tmp_path, caplog):
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(14_000_000_000)  # sparse: OLMoE-1B-7B in bfloat16
    with caplog.at_level("INFO"):
        num_actors = default_num_actors(
            SelectConfig(), str(tmp_path), {"CPU": 64.0, "memory": 90 * GIGABYTES}
        )
    assert num_actors == 3
    assert "3 actors instead of 64: the cluster's 90.0 GB of memory hold no more" in caplog.text
