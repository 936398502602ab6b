# SPDX-License-Identifier: Apache-2.0
"""What the references and the fast paths of the GRPO losses agree on: one definition each."""
