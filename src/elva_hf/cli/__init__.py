"""The command `elva`: ask a video a question, plan tokens, draw merges, train, make and check checkpoints."""

from elva_hf.cli.application import app, main
from elva_hf.cli.asking import ask, demo
from elva_hf.cli.checkpoints import export, init
from elva_hf.cli.data import data_app
from elva_hf.cli.evaluation import evaluate
from elva_hf.cli.machine import doctor
from elva_hf.cli.planning import plan
from elva_hf.cli.showing import show
from elva_hf.cli.teaching import teach
from elva_hf.cli.training import train

for _command in (ask, demo, plan, show, init, train, teach, export, doctor):
    app.command()(_command)
app.command("eval")(evaluate)
app.add_typer(data_app, name="data")

__all__ = ["app", "main"]
