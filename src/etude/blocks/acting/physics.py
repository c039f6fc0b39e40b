"""The inner state of MuJoCo's worlds: what the next step is computed from, and what an environment reads before it.

Gymnasium's environments look at positions and forces of the last step while they take the next, so the physical state alone
would not continue one to the last bit.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

READ = (
    *("xpos", "xquat", "xmat", "xipos", "ximat", "geom_xpos", "geom_xmat", "site_xpos", "site_xmat", "subtree_com"),
    *(
        "cinert",
        "cvel",
        "cfrc_ext",
        "cfrc_int",
        "qacc",
        "qfrc_actuator",
        "qfrc_constraint",
        "actuator_force",
        "sensordata",
    ),
)
"""Derived arrays that are kept with the state."""


def simulated(env: Any) -> bool:
    """Whether an environment's state is a simulation of MuJoCo's."""
    package = sys.modules.get("mujoco")
    return package is not None and isinstance(getattr(env, "data", None), package.MjData)


def state_of(env: Any) -> dict[str, Any]:
    """Everything that exact continuation needs, as arrays."""
    mujoco: Any = sys.modules["mujoco"]
    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    physics = np.empty(mujoco.mj_stateSize(env.model, kind))
    mujoco.mj_getState(env.model, env.data, physics, kind)
    return {"physics": physics, **{name: getattr(env.data, name).copy() for name in READ}}


def put(env: Any, state: dict[str, Any]) -> None:
    """Continue where `state` was taken."""
    mujoco: Any = sys.modules["mujoco"]
    mujoco.mj_resetData(env.model, env.data)
    mujoco.mj_setState(env.model, env.data, np.asarray(state["physics"]), mujoco.mjtState.mjSTATE_INTEGRATION)
    for name in READ:
        getattr(env.data, name)[:] = state[name]
