"""Devices to compile for that are not attached."""

import os
from collections.abc import Sequence

import jax

from vvt_jax.system.errors import UserError


def target_devices(target: str) -> Sequence[jax.Device]:
    """Return the devices of a TPU topology, e.g. `"v5e:2x2"`, to compile for without a TPU.

    Raises:
        UserError: libtpu is not installed, or does not know the topology.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to query
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(target, platform="tpu").devices
    except Exception as error:  # libtpu's own types, and import errors from several layers
        reason = str(error).strip().partition("\n")[0][:200]
        raise UserError(
            f"There is nothing to compile for {target!r} with ({reason}): it takes a topology such "
            "as v5e:2x2, and `pip install 'vvt-jax[tpu]'`."
        ) from error
