"""The notebooks' door: what they use of the package deltarank, by name, and nothing else."""

from deltarank.adapters import AdapterPlan, extract_adapter
from deltarank.alignment import open_pair
from deltarank.checkpoints import layer_and_module, open_checkpoint
from deltarank.compare import compare_checkpoints
from deltarank.gram import leading_eigenvectors, leading_factors
from deltarank.ranks import rank_of, recommend_ranks, verdict
from deltarank.runtime import ROOT, build_folder, cache_folder, device, interactive, progress
from deltarank.spectra import (
    above_edge,
    common_energy,
    energy,
    energy_rank,
    entropy_rank,
    factor_singular_values,
    null_energy,
    rank_measures,
    singular_values,
    spectrum_measures,
    stable_rank,
    subspace_overlap,
    truncate,
)
from deltarank.store import load_entry, save_entry
from deltarank.study import taskdata
from deltarank.study.claims import assert_claims, assert_table
from deltarank.study.configs import GROWTH_ROWS, MEASUREMENT, RunConfig
from deltarank.study.convert import GEMMA
from deltarank.study.cuts import (
    CUT_PARTS,
    LENGTH_PARTS,
    cut,
    cut_by_matrix,
    score_pair,
    stored_cuts,
)
from deltarank.study.directions import directions, input_moments
from deltarank.study.evaluation import evaluate, generate, score_rows
from deltarank.study.figures import (
    VENUE_WIDTHS,
    figure_width,
    label_lines,
    label_points,
    line_key,
    plot_by_task,
    plot_marks,
    rank_axis,
    save_figure,
    save_table,
    set_style,
    task_grid,
)
from deltarank.study.floors import copied, copy_score, floors, skill_gain, skill_kept
from deltarank.study.gains import (
    at_gain,
    bracket_text,
    captured_energy,
    first_epoch_kbit,
    gain_kept,
    median_bracket,
    needed_bracket,
    needed_rank,
)
from deltarank.study.measuring import measure
from deltarank.study.models import TINY, load_model, load_tokenizer, matrices, model_sha256
from deltarank.study.overlaps import OVERLAP_RANKS, overlaps
from deltarank.study.pairs import FolderPair, RunPair
from deltarank.study.plan import (
    SCALES,
    again_configs,
    base_configs,
    budget_configs,
    cut_until,
    embedding_configs,
    full_configs,
    lora_configs,
    lora_until,
    production_configs,
    scaling_configs,
    warmup_configs,
)
from deltarank.study.profiles import PAIR_TIMES, PLANTED_RANKS, PROFILES, profile
from deltarank.study.runs import (
    Result,
    example_update,
    run,
    save_model,
    spectral_gap,
    stored,
    sweep,
    updates,
)
from deltarank.study.search import coarse_search, coarsely_tuned, lr_between, lr_search, tuned
from deltarank.study.tables import (
    bootstrap_interval,
    by_part,
    cut_gains,
    ends,
    finer_table,
    gain,
    keep_table,
    runs_table,
    scaling_table,
    show_row,
    spearman,
    spectra_table,
)
from deltarank.study.tasks import (
    TASK_FOLDER,
    TASKS,
    Task,
    collate,
    encode,
    load_task,
    pack,
    task_sha256,
)
from deltarank.study.training import has_compiler, lora_layers, prepare, train
