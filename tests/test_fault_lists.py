# SPDX-License-Identifier: Apache-2.0
"""The faults that images, data and runs are tested with, and the test of each.

An image or a row is set aside with its reason, or refused. Of a run nothing is lost: it goes on
from the newest whole checkpoint, or it is refused before it trains.
"""

from __future__ import annotations

import re
from pathlib import Path

ROW = "test_data_vlm_r1.py::test_a_bad_row_is_named_and_set_aside"
NAMED = "test_images.py::test_a_fault_is_named"
MODE = "test_images.py::test_every_mode_becomes_rgb"

IMAGES = {
    "a JPEG cut short": "test_data_table.py::test_bytes_that_break_while_decoding_are_listed"
    "_when_opened",
    "a file of 20 bytes": f"{ROW}[not_an_image twenty bytes]",
    "an empty file": f"{ROW}[not_an_image empty]",
    "HTML named .jpg": f"{ROW}[not_an_image html]",
    "bytes of zero": f"{NAMED}[not_an_image zeros]",
    "bits that flip": "test_images.py::test_bits_that_flip_give_an_image_or_a_named_fault",
    "a GIF's header that unfolds": f"{ROW}[too_many_pixels gif]",
    "a PNG of 81 million pixels": f"{ROW}[too_many_pixels 81 million]",
    "a PNG of 169 million pixels": f"{ROW}[too_many_pixels 169 million]",
    "a PNG of 196 million pixels": f"{ROW}[too_many_pixels 196 million]",
    "an animated GIF": "test_images.py::test_animations_show_their_first_frame",
    "EXIF orientation": "test_images.py::test_exif_is_applied_to_size_and_pixels_as_transformers"
    "_does",
    **{f"mode {mode}": f"{MODE}[{mode}]" for mode in ("L", "LA", "P", "RGBA", "CMYK", "F")},
    "mode I;16": f"{MODE}[I;16 in TIFF]",
    "a 16-bit PNG": f"{MODE}[I;16]",
    "SVG": f"{ROW}[not_an_image svg]",
    "a missing file": f"{ROW}[missing]",
    "an unreadable file": "test_images.py::test_a_file_that_may_not_be_read_is_named",
    "a directory": f"{ROW}[not_a_file folder]",
    "a FIFO": f"{ROW}[not_a_file pipe]",
    "/dev/zero": f"{ROW}[outside_folder device]",
    "a link out of the folder": f"{ROW}[outside_folder link]",
    "..": f"{ROW}[outside_folder dots]",
    "an absolute path": f"{ROW}[outside_folder absolute]",
    "file://": f"{ROW}[url file]",
    "http://": f"{ROW}[url]",
    "NUL in a name": f"{ROW}[bad_name NUL]",
    "a name of 4096 characters": f"{ROW}[unreadable name]",
    "a name that is not UTF-8": f"{ROW}[bad_json encoding]",
    "a column missing": "test_data_table.py::test_names_that_cannot_be_loaded",
    "a wrong type": f"{ROW}[bad_name number]",
    "None": f"{ROW}[bad_name null in list]",
    "a closed PIL image": f"{NAMED}[broken closed]",
    "an array of 0 x 0": f"{NAMED}[not_an_image empty array]",
}

KILL = "test_trl_kills.py::test_a_run_killed_in_each_phase_repeats_the_uninterrupted_one"
CUT = "test_trl_faults.py::test_a_file_cut_short_is_passed_over"
FULL = "test_trl_faults.py::test_a_disk_that_fills_leaves_whole_checkpoints_only"
OTHER = "test_trl_faults.py::test_another_batch_or_group_samples_anew"
RUNS = {
    **{
        f"kill -9 while saving, {i + 1}": "test_trl_kills.py"
        "::test_runs_killed_while_they_save_repeat_the_uninterrupted_one[one]"
        for i in range(20)
    },
    **{
        f"kill in {phase}": f"{KILL}[{phase}]"
        for phase in ("rollout", "reward", "forward", "backward", "optimizer", "evaluation")
    },
    "SIGTERM": "test_trl_checkpoints.py::test_sigterm_saves_and_ends",
    "SIGINT": "test_trl_faults.py::test_an_interrupted_run_goes_on_in_the_same_process",
    **{
        f"disk full at {limit} bytes": f"{FULL}[{limit}]"
        for limit in ("100", "700", "5_000", "200_000", "40_000")
    },
    "read-only output": "test_trl_faults.py"
    "::test_a_folder_that_cannot_be_written_ends_the_run_before_it_trains",
    "quota": "test_trl_faults.py::test_a_quota_that_ends_leaves_whole_checkpoints_only",
    "safetensors cut short": f"{CUT}[model.safetensors]",
    "optimizer cut short": f"{CUT}[optimizer.pt]",
    "state JSON cut short": f"{CUT}[trainer_state.json]",
    "wrong checksum": "test_trl_checkpoints.py"
    "::test_a_checkpoint_lists_its_files_and_the_pointer_names_it",
    "resumed with another world size": "test_distributed_training.py"
    "::test_a_run_goes_on_in_another_number_of_processes",
    "resumed with another G": f"{OTHER}[num_generations]",
    "resumed with another batch": f"{OTHER}[per_device_train_batch_size]",
    "resumed with another seed": "test_trl_faults.py"
    "::test_another_seed_goes_on_with_the_prompts_of_its_own_order",
    "resumed with another model": "test_trl_faults.py::test_another_model_is_refused",
    "resumed with another library version": "test_trl_faults.py"
    "::test_another_version_of_transformers_goes_on_and_is_named",
    "a poisoned pickle in rng_state": "test_trl_faults.py"
    "::test_a_pickle_in_a_checkpoint_is_not_run[rng_state.pth]",
    "two processes on one output folder": "test_trl_checkpoints.py"
    "::test_a_second_writer_is_refused",
}


def test_every_case_has_its_test():
    here = Path(__file__)
    for case, where in (IMAGES | RUNS).items():
        file, name, parameter = re.fullmatch(r"(.*)::(\w+)(?:\[(.*)\])?", where).groups()
        source = here.with_name(file).read_text()
        assert re.search(rf"^def {name}\(", source, re.M), case
        if parameter:
            assert re.search(rf"""["' (]{re.escape(parameter)}["',:)]""", source), case
    assert (len(IMAGES), len(RUNS)) == (39, 47)
