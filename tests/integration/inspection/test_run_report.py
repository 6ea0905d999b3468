import base64
import html
import io
import re

import pytest
import torch
from PIL import Image

from tests import factories
from ursa import storage
from ursa.artifacts import EvalReport, StageRequest
from ursa.data.versions import commit_version
from ursa.evaluation import evaluate
from ursa.generation import UrsaPipeline
from ursa.inspection.root import read_recipe
from ursa.inspection.run_pictures import draw_with_codes
from ursa.inspection.run_report import CURVES, RunReport, StageRun, run_report
from ursa.release import export_model
from ursa.training.stage import train_stage

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def given(root, tmp_path):
    """What a report of a small run is made of."""
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
    curves = {key: [] for key in CURVES}

    def keep(step, metrics):
        for key in CURVES:
            if key in metrics:
                curves[key].append((step, metrics[key]))

    checkpoint = train_stage(request, on_metrics=keep)
    model = export_model(request, checkpoint, output_uri=root.uri)
    report: EvalReport = evaluate(
        model, root.datasets, root.selection, config, output_uri=root.uri, champion=None
    )
    version = commit_version(
        root.uri, config, root.selection, (visual, text), root.datasets, code={"ursa": "0"}
    )
    steps = [StageRun("data", 3.0, {}), StageRun("video-pretrain", 2.5, curves)]
    links = {"MLflow run": 'http://x/"onclick=1'}
    facts = {"commit": HOSTILE}
    return RunReport("ursa version 1", links, facts, report, request, version, steps)


def test_the_report_holds_everything_itself(given):
    page = run_report(given)
    assert len(page) < 10e6
    sources = re.findall(r'src="([^"]*)"', page)
    kinds = [source.partition(";")[0] for source in sources]
    assert set(kinds) == {"data:image/png", "data:image/jpeg", "data:video/mp4"}
    for source in sources:
        data = base64.b64decode(source.partition(",")[2])
        if "image" in source[:12]:
            Image.open(io.BytesIO(data)).verify()
        else:
            assert data[4:8] == b"ftyp"
    clips = [name for name in given.report.samples if name.endswith(".mp4")]
    assert kinds.count("data:video/mp4") == len(clips) > 0
    # curves, heat maps, tokens of the one caption, memory; the schedule is fixed here
    assert kinds.count("data:image/png") == 4
    assert "Fixed: alpha 1, c 5." in page
    assert kinds.count("data:image/jpeg") > 1
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert 'href="http://x/&quot;onclick=1"' in page
    for text in (
        given.version.manifest_uri,
        given.request.datasets.manifest_uri,
        f"<b>{given.version.selection.num_kept}</b>clips kept",
        f"<b>{given.report.metrics['eval/loss']:.3f}</b>held-out loss",
        "the gate holds" if given.report.gate_passed else given.report.failed_gates[0],
    ):
        assert text in html.unescape(page)
    (row,) = re.findall(r"<td>video-pretrain</td>(.*?)</tr>", page)
    cells = re.findall(r"<td>(.*?)</td>", row)
    tokens = given.request.datasets.video_train.num_tokens
    per_sample = tokens // given.request.datasets.video_train.num_samples
    assert cells[:4] == ["2.5", "2", "4", str(4 * per_sample)]


def test_what_is_not_known_is_said(given):
    refused = given.report.model_copy(
        update={"gate_passed": False, "failed_gates": (f"{HOSTILE} is worse",), "grids": ()}
    )
    page = run_report(given._replace(report=refused, version=None, steps=[]))
    assert '<span class="tag lost">refused</span>' in page
    assert "<li>&lt;script&gt;alert(1)&lt;/script&gt; is worse</li>" in page
    assert "Nothing is held out." in page
    assert page.count("The version of the data set is not known.") == 2
    assert "None: the steps were found done." in page


def test_codes_on_the_way_end_in_those_of_the_clip(given):
    with storage.local_directory(given.report.model.directory_uri) as folder:
        pipeline = UrsaPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    flips = draw_with_codes(pipeline, "a video", 3)
    drawn = pipeline(
        "a video", generator=torch.Generator().manual_seed(3), output_type="latent"
    ).frames
    assert torch.equal(flips.codes[-1], torch.as_tensor(drawn[0]))
    assert len(flips.codes) == len(flips.times) == pipeline.defaults.num_inference_steps
    assert flips.times == tuple(sorted(flips.times))
