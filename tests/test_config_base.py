"""`base: OTHER.yaml` in recipes, searches and site files: what is inherited, in which order, and what is refused."""

import pytest
import yaml
from conftest import ROOT

from nulsq.config import Recipe, load, load_recipe, resolved, to_yaml
from nulsq.errors import InputError

W2A2 = ROOT / "configs/recipes/digits/w2a2.yaml"


@pytest.fixture
def write(tmp_path):
    """write("a/b.yaml", "text") -> its path; folders are made."""
    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path
    return write


def test_settings_come_from_defaults_then_bases_then_the_file_then_overrides(write):
    write("shared/root.yaml", "optim: {lr: 0.1, epochs: 10, momentum: 0.5}\ndata: {batch: 7}\n")
    write("middle.yaml", "base: shared/root.yaml\noptim: {lr: 0.2, epochs: 20}\n")
    path = write("runs/file.yaml", "base: ../middle.yaml\noptim: {lr: 0.3}\n")
    recipe = load(Recipe, path, ["data.batch=9"])
    assert (recipe.optim.lr, recipe.optim.epochs, recipe.optim.momentum) == (0.3, 20, 0.5)
    assert recipe.data.batch == 9 and recipe.optim.weight_decay == Recipe().optim.weight_decay


def test_the_name_belongs_to_the_file_that_sets_it(write):
    write("base.yaml", "name: first\noptim: {lr: 0.1}\n")
    assert load_recipe(write("set/second.yaml", "base: ../base.yaml\n")).name == "set-second"
    assert load_recipe(write("third.yaml", "base: base.yaml\nname: mine\n")).name == "mine"


def rules(*entries):
    return "quant:\n  rules:\n" + "".join(f"    {entry}\n" for entry in entries)


def test_a_files_own_rules_precede_those_of_its_base(write):
    write("root.yaml", rules("deep: {match: [layer4.*], bits: 3}", "wide: {match: [layer3.*], bits: 5}"))
    write("middle.yaml", "base: root.yaml\n" + rules("stem: {match: ['role:first'], bits: 6}"))
    path = write("file.yaml", "base: middle.yaml\n" + rules("wide: {bits: 4}", "head: {match: ['role:last'], bits: 7}"))
    assert list(load(Recipe, write("alone.yaml", rules("a: {match: [x], bits: 3}"))).quant.rules) == ["edges", "a"]
    assert list(load(Recipe, path.with_name("root.yaml")).quant.rules) == ["edges", "deep", "wide"]
    recipe = load(Recipe, path, ["quant.rules.late.match=[x]"])
    assert list(recipe.quant.rules) == ["wide", "head", "stem", "edges", "deep", "late"]
    assert (recipe.quant.rules["wide"].match, recipe.quant.rules["wide"].bits) == (["layer3.*"], 4)  # merged


def test_a_files_own_rule_takes_a_layer_that_its_bases_rule_matches_too(write):
    import torch

    from nulsq.quant.policy import resolve
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    path = write("file.yaml", f"base: {W2A2}\n" + rules("head: {match: ['role:last'], bits: 5}"))
    bits = {name: weight.bits for name, (weight, _) in resolve(load(Recipe, path).quant, model).items()}
    assert bits == {"0": 8, "1": 2, "2": 5}


def test_a_saved_recipe_has_no_base_and_keeps_the_order_of_the_rules(write):
    write("root.yaml", rules("deep: {match: [layer4.*], bits: 3}"))
    recipe = load_recipe(write("file.yaml", "base: root.yaml\n" + rules("head: {match: ['role:last'], bits: 7}")))
    text = to_yaml(recipe)
    assert "base" not in yaml.safe_load(text)
    again = load(Recipe, write("elsewhere/recipe.yaml", text))
    assert again == recipe and list(again.quant.rules) == list(recipe.quant.rules) == ["head", "edges", "deep"]


def test_the_resolved_text_loads_without_its_bases(write):
    write("root.yaml", "name: root\noptim: {lr: 1e-4}\ndata: {holdout: 'last:5'}\nrun: {train_id: '007'}\n"
          "model: {init_from: 'runs/a-${run.train_id}'}\n" + rules("deep: {match: [layer4.*], bits: 3}"))
    path = write("file.yaml", "base: root.yaml\n" + rules("head: {match: ['role:last'], bits: 7}"))
    recipe, again = (load(Recipe, file) for file in (path, write("copy/file.yaml", resolved(path))))
    assert again == recipe and list(again.quant.rules) == list(recipe.quant.rules)
    assert load(Recipe, path.with_name("file.yaml"), ["run.train_id=8"]).model.init_from == "runs/a-8"
    assert load(Recipe, path.parent / "copy/file.yaml", ["run.train_id=8"]).model.init_from == "runs/a-8"
    assert resolved(W2A2) == W2A2.read_text()  # comments included


def test_a_circle_names_its_files(write):
    write("a.yaml", "base: b.yaml\n")
    write("b.yaml", "base: sub/../c.yaml\n")
    path = write("c.yaml", "base: ./a.yaml\n")
    path.with_name("sub").mkdir()
    with pytest.raises(InputError, match=r"circle: \S*c.yaml -> \S*a.yaml -> \S*b.yaml -> \S*c.yaml"):
        load(Recipe, path)
    with pytest.raises(InputError, match=r"circle: \S*self.yaml -> \S*self.yaml"):
        load(Recipe, write("self.yaml", "base: self.yaml\n"))


def test_a_missing_base_names_the_file_that_wants_it_and_the_nearest_files(write):
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
def test_a_base_that_does_not_fit_is_named(write, base, message):
    write("other.yaml", base)
    with pytest.raises(InputError, match=message):
        load(Recipe, write("file.yaml", "base: other.yaml\n"))


@pytest.mark.parametrize("base", ["3", "[a.yaml]", "''", "{a: b}"])
def test_base_is_a_path(write, base):
    with pytest.raises(InputError, match=r"file.yaml: base = .*, allowed: the path of another YAML file"):
        load(Recipe, write("file.yaml", f"base: {base}\n"))


@pytest.mark.parametrize("overrides", [["base=other.yaml"], ["base.x=1"], {"base": "other.yaml"}])
def test_base_is_no_setting(overrides):
    with pytest.raises(InputError, match="base is a line of a YAML file, not a setting"):
        load(Recipe, W2A2, overrides)


def test_searches_and_site_files_have_bases_too(write, monkeypatch):
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
