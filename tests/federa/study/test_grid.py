import pytest

from federa import InputError
from federa.study.grid import Kind, load_study

TAGGING = {"task": {"name": "token-classification"}, "partition": {"scheme": "iid"}, "baselines": ["linear-probe"]}
POINTS = [(("client.lr", 0.003),), (("client.lr", 0.01),)]


def test_every_cell_is_a_run_of_its_own(tiny_study):
    study = load_study(tiny_study(alphas=[0.1, 1.0], seeds=[3, 4]))
    kind = Kind("base", "docs", "lora")
    assert study.kinds == [Kind("base", "docs", "federa"), kind] and study.points(kind) == POINTS
    cells = study.grid(kind, POINTS[1])
    assert [(cell.alpha, cell.seed) for cell in cells] == [(0.1, 3), (0.1, 4), (1.0, 3), (1.0, 4)]
    config = study.run_config(cells[2])
    assert (config.method.name, config.partition.alpha, config.seed) == ("lora", 1.0, 3)
    assert config.client.lr == 0.01 and config.server.rounds == 2 and config.evaluation.per_client
    assert cells[2].name == "base/docs/lora/alpha=1,seed=3,client.lr=0.01"
    seeds = load_study(tiny_study(seeds=[2**62, 2**62 + 1])).grid(kind, POINTS[1])
    assert seeds[0].name != seeds[1].name


def test_the_sweep_is_of_the_middle_alpha_and_the_first_seed(tiny_study):
    """Its cells are the grid's own where they are as long, so that they run once."""
    study = load_study(tiny_study(alphas=[0.1, 1.0, 10.0]))
    kind = study.kinds[0]
    sweep = study.sweep(kind)
    assert [(cell.alpha, cell.seed, cell.point) for cell in sweep] == [(1.0, 0, point) for point in POINTS]
    assert sweep[1] in study.grid(kind, POINTS[1])
    values = tiny_study(sweep={"over": {"client.lr": [0.1, 0.2]}, "rounds": 1, "seeds": [7, 8], "alphas": [5]})
    short = load_study(values).sweep(kind)
    assert {(cell.alpha, cell.seed, cell.rounds) for cell in short} == {(5.0, 7, 1), (5.0, 8, 1)} and len(short) == 4
    assert short[0].name.endswith("alpha=5,seed=7,client.lr=0.1,rounds=1")


def test_datasets_and_methods_have_keys_of_their_own(tiny_study):
    datasets = {
        "a": {"data": {"max_length": 16}, "alphas": [9.0], "methods": ["lora"], "target": 0.5, "baselines": []},
        "b": {},
    }
    methods = {"federa": {}, "lora": {"method": {"name": "lora", "rank": 2}, "sweep": {"client.head_lr": [0.1]}}}
    study = load_study(tiny_study(datasets=datasets, methods=methods, target=0.7))
    assert study.kinds == [Kind("base", "a", "lora"), Kind("base", "b", "federa"), Kind("base", "b", "lora")]
    point = (("client.head_lr", 0.1),)
    assert study.points(study.kinds[0]) == [point] and study.sweep(study.kinds[0]) == []
    config = study.run_config(study.grid(study.kinds[0], point)[0])
    assert (config.data.max_length, config.method.rank, config.client.head_lr, config.partition.alpha) == (
        16,
        2,
        0.1,
        9,
    )
    assert study.target("a") == 0.5 and study.target("b") == 0.7
    assert study.baselines(study.kinds[0]) == [] and len(study.baselines(study.kinds[1])) == 2
    assert study.baselines(study.kinds[2]) == []  # only beside the first method


def test_the_highest_mean_validation_score_is_chosen(tiny_study):
    over = {"client.lr": [0.001, 0.01, 0.1]}
    study = load_study(tiny_study(sweep={"over": over, "seeds": [0, 1]}))
    kind = study.kinds[0]

    def choose(*means):
        scores = {}
        for cell in study.sweep(kind):
            mean = means[over["client.lr"].index(cell.point[0][1])]
            scores[cell] = None if mean is None else mean + (0.1 if cell.seed else -0.1)
        return study.choose(kind, scores)

    middle = choose(0.5, 0.6, 0.4)
    assert middle.point == (("client.lr", 0.01),) and middle.edges == []
    assert [score for _, score in middle.tried] == pytest.approx([0.5, 0.6, 0.4])
    assert choose(0.7, 0.6, 0.4).edges == ["client.lr"] and choose(0.1, 0.2, 0.3).edges == ["client.lr"]
    assert choose(0.5, 0.5, 0.5).point == (("client.lr", 0.001),)  # of equal ones the lowest
    failed = choose(0.2, None, None)
    assert failed.point == (("client.lr", 0.001),) and failed.tried[1][1] is None
    with pytest.raises(InputError, match="every run of its sweep failed"):
        choose(None, None, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alphas": []}, "alphas: List should have at least 1 item"),
        ({"seeds": [0, 0]}, "seeds must hold distinct values, got [0, 0]"),
        ({"datasets": {}}, "datasets: "),
        ({"datasets": {"a/b": {}}}, "datasets.a/b"),
        ({"datasets": {"a": {"methods": ["x"]}}}, "datasets.a.methods must be among federa, lora, got x"),
        ({"sweep": {"over": {"client.lr": [0.1, 0.01]}}}, "sweep.over.client.lr must rise, got [0.1, 0.01]"),
        ({"sweep": {"over": {"client.rate": [0.1]}}}, "client.rate is not a key; "),
        ({"methods": {"m": {"methd": {}}}}, "config: methd is not a key; "),
        ({"methods": {"m": {"method": {"rank": 0}}}}, "method.rank must be greater than or equal to 1, got 0"),
        ({"datasets": {"a": {"data": {"validation": 0.0}}}}, "data.validation must be above 0 in a study, got 0"),
        ({"sweeps": {}}, "sweeps: "),
        (
            {"datasets": {"a": TAGGING}},
            "datasets.a.baselines: linear-probe predicts one label an example and cannot serve",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_end_in_one_line_before_anything_runs(tiny_study, changes, message):
    with pytest.raises(InputError) as raised:
        load_study(tiny_study(**changes))
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_stored_study_is_the_study(tiny_study, tmp_path):
    study = load_study(tiny_study())
    (tmp_path / "study.yaml").write_text(study.dump())
    assert load_study(tmp_path / "study.yaml") == study
