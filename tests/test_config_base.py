"""`base: OTHER.yaml` in recipes, searches and site files: what is inherited, in which order, and what is rejected."""

import pytest
import yaml
from conftest import ROOT

from nulsq.config import Recipe, load, load_recipe, resolved, to_yaml
from nulsq.errors import InputError

W2A2 = ROOT / "configs/recipes/digits/w2a2.yaml"


@pytest.fixture
def write(tmp_path):
    """write("a/b.yaml", "text") creates the file and its folders, and returns its path."""
    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path
    return write


def test_defaults_are_overridden_by_bases_then_the_file_then_overrides(write):
    write("shared/root.yaml", "optim: {lr: 0.1, epochs: 10, momentum: 0.5}\ndata: {batch: 7}\n")
    write("middle.yaml", "base: shared/root.yaml\noptim: {lr: 0.2, epochs: 20}\n")
    path = write("runs/file.yaml", "base: ../middle.yaml\noptim: {lr: 0.3}\n")
    recipe = load(Recipe, path, ["data.batch=9"])
    assert (recipe.optim.lr, recipe.optim.epochs, recipe.optim.momentum) == (0.3, 20, 0.5)
    assert recipe.data.batch == 9 and recipe.optim.weight_decay == Recipe().optim.weight_decay


def test_name_is_not_inherited_from_the_base(write):
    write("base.yaml", "name: first\noptim: {lr: 0.1}\n")
    assert load_recipe(write("set/second.yaml", "base: ../base.yaml\n")).name == "set-second"
    assert load_recipe(write("third.yaml", "base: base.yaml\nname: mine\n")).name == "mine"


def rules(*entries):
    return "quant:\n  rules:\n" + "".join(f"    {entry}\n" for entry in entries)


def test_rules_of_a_file_precede_the_rules_of_its_base(write):
    write("root.yaml", rules("deep: {match: [layer4.*], bits: 3}", "wide: {match: [layer3.*], bits: 5}"))
    write("middle.yaml", "base: root.yaml\n" + rules("stem: {match: ['role:first'], bits: 6}"))
    path = write("file.yaml", "base: middle.yaml\n" + rules("wide: {bits: 4}", "head: {match: ['role:last'], bits: 7}"))
    assert list(load(Recipe, write("alone.yaml", rules("a: {match: [x], bits: 3}"))).quant.rules) == ["edges", "a"]
    assert list(load(Recipe, path.with_name("root.yaml")).quant.rules) == ["edges", "deep", "wide"]
    recipe = load(Recipe, path, ["quant.rules.late.match=[x]"])
    assert list(recipe.quant.rules) == ["wide", "head", "stem", "edges", "deep", "late"]
    assert (recipe.quant.rules["wide"].match, recipe.quant.rules["wide"].bits) == (["layer3.*"], 4)  # merged


def test_rule_of_a_file_wins_over_a_matching_rule_of_its_base(write):
    import torch

    from nulsq.quant.policy import resolve
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    path = write("file.yaml", f"base: {W2A2}\n" + rules("head: {match: ['role:last'], bits: 5}"))
    bits = {name: weight.bits for name, (weight, _) in resolve(load(Recipe, path).quant, model).layers.items()}
    assert bits == {"0": 8, "1": 2, "2": 5}


def test_saved_recipe_has_no_base_and_keeps_the_order_of_rules(write):
    write("root.yaml", rules("deep: {match: [layer4.*], bits: 3}"))
    recipe = load_recipe(write("file.yaml", "base: root.yaml\n" + rules("head: {match: ['role:last'], bits: 7}")))
    text = to_yaml(recipe)
    assert "base" not in yaml.safe_load(text)
    reloaded = load(Recipe, write("elsewhere/recipe.yaml", text))
    assert reloaded == recipe and list(reloaded.quant.rules) == list(recipe.quant.rules) == ["head", "edges", "deep"]


def test_resolved_text_loads_without_its_bases(write):
    write("root.yaml", "name: root\noptim: {lr: 1e-4}\ndata: {holdout: 'last:5'}\nrun: {train_id: '007'}\n"
          "model: {init_from: 'runs/a-${run.train_id}'}\n" + rules("deep: {match: [layer4.*], bits: 3}"))
    path = write("file.yaml", "base: root.yaml\n" + rules("head: {match: ['role:last'], bits: 7}"))
    recipe, reloaded = (load(Recipe, file) for file in (path, write("copy/file.yaml", resolved(path))))
    assert reloaded == recipe and list(reloaded.quant.rules) == list(recipe.quant.rules)
    assert load(Recipe, path.with_name("file.yaml"), ["run.train_id=8"]).model.init_from == "runs/a-8"
    assert load(Recipe, path.parent / "copy/file.yaml", ["run.train_id=8"]).model.init_from == "runs/a-8"
    assert resolved(W2A2) == W2A2.read_text()  # comments included


def test_error_for_circular_bases_names_the_files(write):
    write("a.yaml", "base: b.yaml\n")
    write("b.yaml", "base: sub/../c.yaml\n")
    path = write("c.yaml", "base: ./a.yaml\n")
    path.with_name("sub").mkdir()
    with pytest.raises(InputError, match=r"circle: \S*c.yaml -> \S*a.yaml -> \S*b.yaml -> \S*c.yaml"):
        load(Recipe, path)
    with pytest.raises(InputError, match=r"circle: \S*self.yaml -> \S*self.yaml"):
        load(Recipe, write("self.yaml", "base: self.yaml\n"))


def test_error_for_missing_base_names_the_referring_file_and_similar_files(write):
    for name in "abcdefgh":
        write(f"{name}.yaml", "")
    write("rn18_w2a2.yaml", "")
    path = write("file.yaml", "base: rn18_w3a2.yaml\n")
    with pytest.raises(InputError, match=r"file.yaml: base: no file \S*rn18_w3a2.yaml; there are: \S*rn18_w2a2.yaml"):
        load(Recipe, path)


@pytest.mark.parametrize(("base", "message"), [
    ("- a\n", r"file.yaml: base: \S*other.yaml must hold a mapping"),
    ("a: [1\n", r"file.yaml: base: \S*other.yaml is not readable YAML"),
    ("optim: {lrr: 1}\n", r"^\S*other.yaml: optim.lrr: .*Did you mean: 'lr'"),
    ("optim: {lr: -1}\n", r"optim.lr = -1.0, allowed: above 0"),
])
def test_error_for_invalid_base_names_its_file(write, base, message):
    write("other.yaml", base)
    with pytest.raises(InputError, match=message):
        load(Recipe, write("file.yaml", "base: other.yaml\n"))


@pytest.mark.parametrize("base", ["3", "[a.yaml]", "''", "{a: b}"])
def test_base_must_be_a_path(write, base):
    with pytest.raises(InputError, match=r"file.yaml: base = .*, allowed: the path of another YAML file"):
        load(Recipe, write("file.yaml", f"base: {base}\n"))


@pytest.mark.parametrize("overrides", [["base=other.yaml"], ["base.x=1"], {"base": "other.yaml"}])
def test_base_cannot_be_an_override(overrides):
    with pytest.raises(InputError, match="base is a line of a YAML file, not a setting"):
        load(Recipe, W2A2, overrides)


def test_searches_and_site_files_can_have_bases(write, monkeypatch):
    from launch.site import load_site
    from tune.space import load_search
    monkeypatch.chdir(ROOT)
    demo = load_search("configs/search/demo.yaml")
    search = load_search(write("more.yaml", f"base: {ROOT / 'configs/search/demo.yaml'}\nname: null\ntrials: 9\n"
                               "space: {lr: {high: 0.2}}\n"))
    assert (search.name, search.trials, search.space["lr"].low, search.space["lr"].high) == ("more", 9, 0.005, 0.2)
    assert (search.recipe, list(search.space)) == (demo.recipe, list(demo.space))
    site = load_site(write("big.yaml", f"base: {ROOT / 'configs/cluster/slurm_8gpu.yaml'}\nnodes: 9\n"), ["hours=2"])
    assert (site.nodes, site.gpus, site.hours) == (9, 8, 2.0)
