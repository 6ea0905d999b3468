from huggingface_hub import ModelCard

from tests import factories
from ursa.artifacts import EvalReport, StageRequest
from ursa.data.versions import commit_version
from ursa.evaluation import evaluate
from ursa.inspection.model_card import model_card
from ursa.inspection.root import read_recipe
from ursa.release import export_model
from ursa.training.stage import train_stage

HOSTILE = "CC | BY\nnew line <script>[x](javascript:alert(1))`"


def test_the_card_says_what_the_records_say(root, tmp_path):
    text = factories.write_text_tokenizer(str(tmp_path))
    visual = read_recipe(root.datasets).visual_tokenizer
    stages = {"max_steps": 2, "checkpoint_every": 2, "validate_every": 2, "global_batch_size": 2}
    config = root.config.model_copy(
        update={"stages": factories.tiny_config({"stages": {"video_pretrain": stages}}).stages}
    )
    request = StageRequest(
        stage="video_pretrain",
        config=config,
        datasets=root.datasets,
        visual_tokenizer=visual,
        text_tokenizer=text,
        init_from=None,
        output_uri=root.uri,
    )
    checkpoint = train_stage(request)
    model = export_model(request, checkpoint, output_uri=root.uri)
    report: EvalReport = evaluate(
        model, root.datasets, root.selection, config, output_uri=root.uri, champion=None
    )
    version = commit_version(
        root.uri, config, root.selection, (visual, text), root.datasets, code={"ursa": "0"}
    )
    content = model_card(
        report, request, [checkpoint], version, name="ursa version 1", origin={"source": HOSTILE}
    )
    card = ModelCard(content)
    assert card.data.pipeline_tag == "text-to-video"
    found = {item.metric_type: item.metric_value for item in card.data.eval_results}
    assert found["loss"] == round(report.metrics["eval/loss"], 4)
    for part in (
        model.directory_uri,
        f"{root.selection.num_kept:,} are kept",
        f"{version.num_tokens:,} visual tokens",
        f"| video_pretrain | 2 | {checkpoint.num_samples_seen} |",
        f"{report.metrics['eval/unigram_loss']:.3f}",
        "| source | `` CC \\| BY\\nnew line <script>[x](javascript:alert(1))` `` |",
        "| unknown |",
        report.failed_gates[0] if report.failed_gates else "The gate holds",
    ):
        assert part in content
