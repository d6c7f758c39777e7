"""What a new user met in the first hour, and the tests that hold it.

The rows are findings of a trial by people who had not seen mmllm before, of severity 3 and more,
without those that concern what the model itself has learned.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PILImage

from mmllm.cli import main
from mmllm.mini.concepts import known_concepts
from tests.demo.browser import shot

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

ROWS: dict[str, list[str]] = {
    # --- README and docs ------------------------------------------------------------------------
    "R1: why this, and not the others": ["test_first_hour.py::test_the_readme_compares"],
    "R2: how far the figures go": ["test_first_hour.py::test_the_readme_names_limits"],
    "R3: a list of what mini knows": ["test_first_hour.py::test_what_mini_knows_is_listed"],
    "R4: a picture that moves": ["test_first_hour.py::test_the_readme_opens_with_moving_pictures"],
    "R5: a tutorial": ["test_tutorial.py::test_a_chapter_works_as_it_is_printed"],
    "R5: a glossary": ["test_site.py::test_a_term_of_the_glossary_has_a_meaning_and_a_place"],
    "R6: an installation without a clone": [
        "test_package.py::test_the_metadata_is_that_of_the_project",
        "test_package.py::test_the_wheel_holds_what_is_imported_and_named",
    ],
    # --- make demo ------------------------------------------------------------------------------
    "D1: the gallery shows a short run as the product": [
        "test_gallery.py::test_two_models_stand_side_by_side",
        "test_gallery.py::test_the_demos_headline_is_what_was_measured",
        "test_gallery.py::test_the_demos_prompts_are_of_things_that_are_in_its_data",
    ],
    "D2, D4: NO without a reason, a table of 49 rows": [
        "evaluation/test_report.py::test_the_summary_is_a_line_for_each_ability_and_what_was_missed"
    ],
    "D5: 1,334 redrawn bars, no time left": [
        "utils/test_progress.py::test_one_line_of_a_terminal_is_redrawn",
        "utils/test_progress.py::test_a_file_gets_no_bar",
        "training/test_output.py::test_a_file_gets_few_lines_and_no_bar",
        "training/test_output.py::test_a_terminal_has_one_bar_at_a_time",
    ],
    "D6: a report of 7,000 pixels of config": [
        "training/test_report.py::test_the_report_shows_losses_samples_and_speed_first",
        "training/test_report.py::test_samples_of_the_same_prompts_stand_side_by_side",
        "training/test_report.py::test_losses_have_names_for_readers_and_stand_by_modality",
    ],
    "D3: no folder of the author's machine": [
        "evaluation/test_report.py::test_the_baseline_that_is_shipped_is_called_so",
        "mini/test_shipped.py::test_nothing_that_ships_names_a_folder_of_the_machine_that_made_it",
    ],
    "D1: the gallery shows the shipped model too, and asks what the data can answer": [
        "test_gallery.py::test_two_models_stand_side_by_side",
        "test_gallery.py::test_the_demos_headline_is_what_was_measured",
        "test_gallery.py::test_the_demos_prompts_are_of_things_that_are_in_its_data",
    ],
    "D6: report.html tells the story first": [
        "training/test_report.py::test_the_report_shows_losses_samples_and_speed_first",
        "training/test_report.py::test_samples_of_the_same_prompts_stand_side_by_side",
        "training/test_report.py::test_losses_have_names_for_readers_and_stand_by_modality",
        "training/test_report.py::test_curves_are_a_grid",
    ],
    # --- the page in the browser ----------------------------------------------------------------
    "W2: errors are seen; W4: Retry; W6: thumbnails; W7: two menus; W8: clear asks": [
        "demo/test_page.py::test_the_whole_page_in_a_real_browser",
        "demo/test_page.py::test_everything_is_reached_by_keyboard",
    ],
    "W3: code keeps its indentation; W5: quiet notes": [
        "demo/test_page.py::test_replies_are_markdown_and_what_was_written_stays_as_it_was",
        "demo/test_markdown.py::test_code_stays_as_it_was_also_while_it_is_being_written",
    ],
    "W8: images at their size": ["demo/test_page.py::test_pictures_are_shown_at_an_honest_size"],
    "W11: About says what it knows": ["demo/test_mini.py::test_mini_is_accessible"],
    # --- chat in the terminal -------------------------------------------------------------------
    "C6: words stream, pictures show, one folder": [
        "cli/test_terminal_chat.py::test_a_chat_at_a_terminal",
        "cli/test_terminal_chat.py::test_parts_are_printed_in_order_as_they_come",
        "cli/test_terminal_chat.py::test_no_file_is_overwritten_and_a_failed_one_leaves_nothing",
    ],
    "C7: /force picture": [
        "cli/test_terminal_chat.py::test_a_chat_at_a_terminal",
        "cli/test_entry.py::test_a_chat_of_several_turns",
    ],
    "C11: --version, and one way to name a model": [
        "cli/test_entry.py::test_the_version_is_an_option_too",
        "cli/test_entry.py::test_which_model_is_asked_what",
    ],
    # --- chat in the browser --------------------------------------------------------------------
    "W2: errors that nobody sees": ["demo/test_page.py::test_the_whole_page_in_a_real_browser"],
    "W3: code without its indentation": [
        "demo/test_markdown.py::test_line_breaks_and_spaces_of_plain_text_stay",
        "demo/test_markdown.py::test_code_stays_as_it_was_also_while_it_is_being_written",
        "demo/test_page.py::test_replies_are_markdown_and_what_was_written_stays_as_it_was",
    ],
    "W4: Retry repeats itself": ["demo/test_page.py::test_the_whole_page_in_a_real_browser"],
    "W5, W6, W7: seeds, the start page, the menus": [
        "demo/test_page.py::test_the_whole_page_in_a_real_browser",
        "demo/test_page.py::test_everything_is_reached_by_keyboard",
    ],
    "W8: pictures blown up and blurred": [
        "demo/test_page.py::test_pictures_are_shown_at_an_honest_size"
    ],
    # --- Python ---------------------------------------------------------------------------------
    "chat.reply('Draw a cat') and all other first lines": [
        "test_first_lines.py::test_a_first_line_does_what_is_meant",
        "test_first_lines.py::test_unsupported_first_lines_name_the_remedy",
        "test_first_lines.py::test_there_are_at_least_ninety_two_lines",
    ],
    "a Message, a str, a list, a call": [
        "inference/test_inputs.py::test_text_is_accepted_in_every_form",
        "inference/test_inputs.py::test_a_chat_can_be_called",
    ],
    "the name of a file read as text": [
        "inference/test_inputs.py::test_a_file_name_as_text_is_refused_with_a_remedy",
        "inference/test_inputs.py::test_media_urls_as_text_are_refused_with_a_remedy",
    ],
    "Pillow, Path, ndarray, OpenAI's dicts": [
        "inference/test_inputs.py::test_images_are_accepted_in_every_form"
    ],
    "reply.image, .images, .save": [
        "inference/test_inputs.py::test_a_reply_gives_its_media_by_kind"
    ],
    "Jupyter": ["inference/test_inputs.py::test_notebooks_show_replies_and_media"],
    "max_tokens, steps, system, image": [
        "inference/test_inputs.py::test_common_names_of_options_are_understood",
        "inference/test_inputs.py::test_unsupported_options_are_refused_with_a_remedy",
        "inference/test_inputs.py::test_a_system_message_and_media_by_keyword",
    ],
    "modalities=['image']": ["inference/test_inputs.py::test_modalities_by_list_and_by_name"],
    "device='auto', 'cuda' without one": [
        "inference/test_inputs.py::test_devices_and_types_as_torch_names_them",
        "test_first_lines.py::test_unsupported_first_lines_name_the_remedy",
    ],
    "a library that prints": ["inference/test_inputs.py::test_loading_as_a_library_prints_nothing"],
    # --- server ---------------------------------------------------------------------------------
    "size, quality, style": ["server/test_lenient.py::test_a_picture_of_another_size_is_reported"],
    "pictures for clients that know only content": [
        "server/test_media_in_content.py::test_content_holds_the_files",
        "server/test_clients.py::test_recorded_requests_show_a_picture",
        "server/test_clients.py::test_langchain_chat",
        "server/test_clients.py::test_langchain_responses",
    ],
    "response_format: url, mp3": [
        "server/test_lenient.py::test_pictures_behind_urls",
        "server/test_lenient.py::test_speech_is_mp3_where_it_is_asked_for",
    ],
    "responses, transcriptions, edits": [
        "server/test_responses.py::test_a_picture_in_and_a_picture_out",
        "server/test_chat.py::test_a_transcription_describes_the_sound",
        "server/test_edits.py::test_an_edit_is_a_reply_that_starts_from_the_picture",
        "server/test_clients.py::test_open_webui_hears_speaks_and_edits",
    ],
    "tools, json_schema, penalties, unknown fields; n": [
        "server/test_lenient.py::test_unknown_fields_are_dropped_and_named",
        "server/test_chat.py::test_choices_are_the_replies_of_their_seeds",
    ],
    # --- own data -------------------------------------------------------------------------------
    "T2: words without pre-alignment learn nothing": [
        "training/test_words.py::test_words_without_prealignment_are_warned_of"
    ],
    "T3: teach it one's own pictures": [
        "training/test_teaching.py::"
        "test_a_taught_model_names_the_things_in_a_style_that_it_was_not_taught",
        "test_tutorial.py::test_a_chapter_works_as_it_is_printed",
    ],
    "T4: it forgets": [
        "training/test_teaching.py::test_only_the_projection_that_was_taught_differs",
        "training/test_teaching.py::"
        "test_a_thing_that_is_known_gets_no_second_name_and_what_was_read_is_not_read_again",
    ],
    "T5: a stage starts from mini by name": [
        "training/test_trainer.py::test_mini_is_accepted_as_a_checkpoint_everywhere"
    ],
    "T6: what the frozen decoders never saw": [
        "test_first_hour.py::test_the_tutorial_says_what_training_cannot_teach"
    ],
    "T11: plan before launch": ["test_plan.py::test_the_command_shows_all_of_it"],
}
"""Finding -> the tests that fail where it comes back."""


@pytest.mark.parametrize("row", ROWS)
def test_a_row_is_held_by_tests_that_exist(row: str) -> None:
    for name in ROWS[row]:
        file, _, function = name.partition("::")
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        found = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        assert function in [node.name for node in found if node.name.startswith("test_")], name


# --- what the README says -----------------------------------------------------------------------


def test_the_readme_compares() -> None:
    table = README[README.index("## Where it stands among others") :].partition("\n## ")[0]
    for name in ("NExT-GPT", "transformers", "vLLM-Omni", "ms-swift", "LLaMA-Factory"):
        assert re.search(rf"^\| .*{name}", table, re.MULTILINE), name
    assert "Take the others" in table


def test_the_readme_names_limits() -> None:
    claims = README[README.index("## What is claimed, and what is not") :].partition("\n## ")[0]
    for limit in ("single requests in English", "several turns", "photographs", "colour"):
        assert limit in " ".join(claims.split()), limit


def test_the_readme_opens_with_moving_pictures() -> None:
    first = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)[0]
    assert README.index(first) < README.index("\n## ")
    with PILImage.open(ROOT / first) as picture:
        assert getattr(picture, "n_frames", 1) > 1


def test_the_tutorial_says_what_training_cannot_teach() -> None:
    tutorial = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    assert "what they have never seen they cannot draw" in " ".join(tutorial.split())
    assert "demos/train_decoder.py" in tutorial


def test_what_mini_knows_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["concepts"]) == 0
    printed = capsys.readouterr().out
    known = known_concepts()
    assert {kind: len(names) for kind, names in known.items()} == {
        **{"image": 323, "colour": 10, "motion": 9, "audio": 80}
    }
    for names in known.values():
        assert ", ".join(names) in printed
    assert "dog" in known["image"]
    assert "piano" in known["audio"]
    assert "`mmllm concepts`" in README


def test_what_mini_knows_is_shown(tmp_path: Path, browse: Callable[..., Any]) -> None:
    file = tmp_path / "new" / "known.html"
    assert main(["concepts", "--page", str(file)]) == 0
    for width in (1280, 390):
        page = browse(width, 800)
        page.goto(file.as_uri())
        things = page.locator("ul.things li")
        assert things.count() == len(known_concepts()["image"])
        assert things.first.locator("img").evaluate("e => e.complete && e.naturalWidth") == 112
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        shot(page, f"known-{width}")
