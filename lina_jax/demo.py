"""A web page on which a trained model draws, set by set.

python -m lina_jax.demo --workdir=DIR [--host=localhost] [--port=7860] [--data=DIR] [--batch_size=1]
    [--raw] [--checkpoint=STEP] [--autoencoder=DIR] [--text_encoder=DIR] [--mesh=AXES]

Needs Gradio (`pip install -e '.[demo]'`). Anyone who can reach the port can draw; Ctrl-C stops the server. Nothing is
fetched from other servers or sent to them. The page shows the command that draws the same images, byte for byte.
"""

import socket
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from lina_jax import drawing, entry
from lina_jax.demo_session import Studio
from lina_jax.errors import UserError
from lina_jax.workdir import load_config


def main(argv: Sequence[str]) -> None:
    del argv
    values = flags.FLAGS
    if not values.workdir:
        raise UserError("--workdir=DIR (a training directory) is needed")
    workdir = Path(values.workdir).expanduser()
    load_config(workdir)  # refuses what is not a training directory before anything slow starts
    try:
        from lina_jax import demo_page
    except ModuleNotFoundError as error:
        raise UserError(f"the page needs Gradio ({error}): pip install -e '.[demo]'") from error
    try:
        door = socket.create_server((values.host, values.port))
    except (OSError, OverflowError) as error:
        raise UserError(f"--host={values.host} --port={values.port}: {error}") from error
    with door:
        studio = Studio(
            workdir,
            data=values.data,
            batch_size=values.batch_size,
            ema=not values.raw,
            checkpoint=values.checkpoint,
            autoencoder=values.autoencoder,
            text_encoder=values.text_encoder,
            mesh=values.mesh,
        )
        demo_page.serve(demo_page.build(studio), door)


if __name__ == "__main__":
    drawing.define_weights_flags()
    flags.adopt_module_key_flags(drawing)  # listed by --help
    flags.DEFINE_string("data", "", "dataset with class names and captions; default: the config's, if it is there")
    flags.DEFINE_string("host", "localhost", "address to listen on; 0.0.0.0: all interfaces")
    flags.DEFINE_integer("port", 7860, "port; 0: any free port")
    flags.DEFINE_integer("batch_size", 1, "images drawn at once; above 1, each new number of images is compiled")
    entry.run(main)
