"""python -m launch PLACE train|search ...: start the same recipe or search somewhere. Today: on this machine."""

from launch import local
from nulsq.errors import Parser, exit_on_input_error


@exit_on_input_error
def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m launch", description=__doc__)
    places = parser.add_subparsers(dest="place", required=True)
    here = places.add_parser("local", help="on this machine")
    verbs = here.add_subparsers(dest="verb", required=True)
    helps = {"train": "a recipe, in --nproc processes under torchrun; settings as for python -m nulsq.train",
             "search": "a search; settings as for python -m tune.search"}
    for verb, text in helps.items():
        each = verbs.add_parser(verb, help=text, description=text)
        each.add_argument("file", help="YAML file")
        each.add_argument("--print", action="store_true", dest="show", help="print the command instead of running it")
        if verb == "train":
            each.add_argument("--nproc", type=int, default=1, help="processes (ranks) on this machine")
    arguments, rest = parser.parse_known_args(argv)
    if arguments.verb == "train":
        return local.train(arguments.file, rest, arguments.nproc, show=arguments.show)
    return local.search(arguments.file, rest, show=arguments.show)


if __name__ == "__main__":
    raise SystemExit(main())
