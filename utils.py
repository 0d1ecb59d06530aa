"""The notebooks' door: what they use of the package deltarank, by name, and nothing else."""

from deltarank.checkpoints import layer_and_module
from deltarank.ranks import ranks_of, recommend_ranks, verdict
from deltarank.runtime import ROOT, build_folder, interactive
from deltarank.spectra import (
    above_edge,
    energy,
    energy_rank,
    entropy_rank,
    factor_singular_values,
    null_energy,
    singular_values,
    spectrum_measures,
    stable_rank,
    subspace_overlap,
    truncate,
)
from deltarank.store import load_entry
from deltarank.study import contest, forgetting, peft_results, signatures, taskdata, treatments
from deltarank.study.advice import FORECAST
from deltarank.study.capacity import code_sweep
from deltarank.study.claims import assert_claims, assert_groups, assert_table
from deltarank.study.codes import draw_codes
from deltarank.study.cuts import CUT_PARTS, LENGTH_PARTS, cut, stored_cuts
from deltarank.study.directions import directions
from deltarank.study.diversity import exchange_table, higher_configs, long_mix, mix_runs, part_gains
from deltarank.study.figures import (
    figure_width,
    label_lines,
    label_points,
    line_key,
    plot_by_task,
    plot_marks,
    plot_seeds,
    rank_axis,
    save_figure,
    save_table,
    set_style,
    task_grid,
)
from deltarank.study.floors import copied, copy_score, floors, skill_gain, skill_kept
from deltarank.study.forecast import fit_line
from deltarank.study.gains import (
    at_gain,
    bracket_text,
    captured_energy,
    ends,
    epoch_rows,
    first_epoch_kbit,
    gain,
    gain_kept,
    learned_kbit,
    median_bracket,
    needed_bracket,
    needed_rank,
    taught_kbit,
)
from deltarank.study.guidance import guidance_table
from deltarank.study.heals import heal_configs, heals_table
from deltarank.study.intruders import intruder_cosines
from deltarank.study.law import fit_law, law_table
from deltarank.study.loads import capacity_table, code_configs, curves_table, longer_configs
from deltarank.study.models import load_model, load_tokenizer, matrices
from deltarank.study.overlaps import (
    OVERLAP_RANKS,
    mean_overlap,
    overlaps,
    overlaps_of_seeds,
    overlaps_of_tasks,
)
from deltarank.study.pairs import PAIR_TIMES, PLANTED_RANKS, FolderPair, RunPair
from deltarank.study.plan import (
    SCALES,
    again_configs,
    alpha_configs,
    base_configs,
    between_config,
    budget_configs,
    cut_until,
    embedding_configs,
    entities_configs,
    full_configs,
    lora_configs,
    lora_until,
    scaling_configs,
    warmup_configs,
)
from deltarank.study.profiles import PROFILES, middle, profile
from deltarank.study.rivals import control, costs, forecasts, known_sizes, read_of, summed_costs
from deltarank.study.runs import Result, example_update, repeated, run, sigma_shift, stored, sweep
from deltarank.study.search import coarse_search, coarsely_tuned, lr_search, tuned
from deltarank.study.sizes import (
    bracket_gains,
    ladder,
    longer_gains,
    lora_by_skill,
    parameters_of,
    place_table,
    size_gains,
)
from deltarank.study.tables import (
    bootstrap_interval,
    by_part,
    costs_table,
    cut_gains,
    finer_table,
    joint_agreement,
    keep_table,
    parts_by_rank,
    regained,
    runs_table,
    scaling_table,
    score_intervals,
    spearman,
    spectra_table,
    spectrum_by_task,
    without_spectrum,
)
from deltarank.study.tasks import TASKS, load_task, show_row
