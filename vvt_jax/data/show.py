"""A contact sheet of what the model sees in training; see `vvt_jax.show`.

python -m vvt_jax.data.show --config=configs/digits.py --out=sheet.png [--step=1] [--images=64]
"""

import runpy

if __name__ == "__main__":  # the command needs training, which `vvt_jax.data` does not import
    runpy.run_module("vvt_jax.show", run_name="__main__", alter_sys=True)
