# SPDX-License-Identifier: Apache-2.0
"""verl's actor and reference model by packed rows; importing this is the switch, and verl does it:

    actor_rollout_ref.model.external_lib=fastgrpo.integrations.verl

verl 0.9 builds a worker's engine from its registry, by the strategy of the configuration. Here our
engine is registered for the strategy "fsdp2" of this machine's vendor, which verl asks before its
own; other strategies are refused when an engine of theirs is built. The critic is left alone.
"""

from fastgrpo.integrations.verl.support import check_installed, check_signatures

check_installed()
check_signatures()

from fastgrpo.integrations.verl.engine import FastGRPOEngine, register

register()
