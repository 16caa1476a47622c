"""The model of a GPU program's time: programs written by hand, with figures counted by hand."""

import pytest

from moe_jax.compiled.chips import CHIPS, Rates
from moe_jax.compiled.hlo import arrays_of, parse_module
from moe_jax.compiled.roofline import grouped, roofline

# Round figures: an operation a second, ten bytes a second, a launch of half a second.
ROUND = Rates(product=1.0, attention=2.0, attention_backward=4.0, memory=10.0, link=5.0, launch=0.5)
H200 = CHIPS["h200"].rates


def _program(*lines, before=""):
    """A program of parameters and `lines`."""
    body = "\n".join(f"  {line}" for line in lines)
    entry = f"ENTRY %main (p: f32[2]) -> f32[2] {{\n{body}\n}}\n"
    return f"HloModule by_hand, is_scheduled=true\n\n{before}\n{entry}"


def _only(*lines, before=""):
    """The single kernel of a program."""
    (kernel,) = roofline(_program(*lines, before=before), ROUND).kernels
    return kernel


PRODUCT = (
    'custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(f)/mlp/dot_general"}, '
    'backend_config={"gemm_backend_config":{"alpha_real":1,"dot_dimension_numbers":{'
    '"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],'
    '"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}'
)


def test_a_large_product_takes_the_time_of_its_operations():
    text = _program(
        "%x = bf16[2048,4096]{1,0} parameter(0)",
        "%w = bf16[4096,11008]{1,0} parameter(1)",
        "ROOT %y = (bf16[2048,11008]{1,0}, s8[33554432]{0}) custom-call(%x, %w), " + PRODUCT,
    )
    (kernel,) = roofline(text, H200).kernels
    assert kernel.kind == "large product"
    assert kernel.flops == 184_683_593_728  # 2 x 2048 x 4096 x 11008
    # Two bytes of each element of x, w and y; the workspace of 32 MiB is not moved.
    assert kernel.moved == 16_777_216 + 90_177_536 + 45_088_768
    # 184.68 GFLOP at 790 TFLOP/s are 233.78 us, 152.0 MB at 4.3 TB/s only 35.4; 2 us of launch.
    assert kernel.seconds == pytest.approx(235.78e-6, rel=1e-4)
    assert kernel.result == "bf16[2048,11008]"
    assert kernel.origin == "jit(f)/mlp/dot_general"


def test_a_pallas_kernel_takes_what_its_metadata_states():
    kernel = _only(
        "%x = f32[8]{0} parameter(0)",
        'ROOT %y = f32[8]{0} custom-call(%x), custom_call_target="__gpu$xla.gpu.triton", '
        'metadata={op_name="jit(f)/pallas_call"}, backend_config={debug = false, ir = "ML\\EFR", '
        'serialized_metadata = "{\\22flops\\22: \\227\\22, \\22bytes\\22: \\22120\\22}"}',
    )
    assert (kernel.kind, kernel.flops, kernel.moved) == ("Pallas kernel", 7.0, 120.0)
    assert kernel.seconds == 12.5  # 120 bytes at ten a second, and the launch


def test_a_thin_product_takes_the_time_of_its_bytes():
    text = _program(
        "%x = bf16[2048,4096]{1,0} parameter(0)",
        "%a = bf16[4096,16]{1,0} parameter(1)",
        "ROOT %y = (bf16[2048,16]{1,0}, s8[33554432]{0}) custom-call(%x, %a), " + PRODUCT,
    )
    (kernel,) = roofline(text, H200).kernels
    assert kernel.kind == "thin product"
    assert kernel.flops == 268_435_456
    # 16,973,824 bytes at 4.3 TB/s are 3.947 us; the operations would take 0.34.
    assert kernel.seconds == pytest.approx(5.947e-6, rel=1e-3)


def test_a_product_that_adds_onto_a_third_operand_reads_it():
    kernel = _only(
        "%x = f32[3,4]{1,0} parameter(0)",
        "%w = f32[4,5]{1,0} parameter(1)",
        "%c = f32[3,5]{1,0} parameter(2)",
        "ROOT %y = (f32[3,5]{1,0}, s8[8]{0}) custom-call(%x, %w, %c), " + PRODUCT,
    )
    assert kernel.flops == 2 * 3 * 4 * 5
    assert kernel.moved == 4 * (12 + 20 + 15 + 15)
    assert kernel.seconds == 120 / 1.0 + 0.5


DOT_FUSION = """
%gemm_computation (a: bf16[7,3,4], b: bf16[7,4,5]) -> bf16[7,3,5] {
  %a = bf16[7,3,4]{2,1,0} parameter(0)
  %b = bf16[7,4,5]{2,1,0} parameter(1)
  ROOT %dot = bf16[7,3,5]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, \
rhs_batch_dims={0}, rhs_contracting_dims={1}, metadata={op_name="jit(f)/experts"}
}
"""


def test_a_product_of_triton_counts_its_batch():
    kernel = _only(
        "%x = bf16[7,3,4]{2,1,0} parameter(0)",
        "%w = bf16[7,4,5]{2,1,0} parameter(1)",
        "ROOT %y = bf16[7,3,5]{2,1,0} fusion(%x, %w), kind=kCustom, calls=%gemm_computation, "
        'backend_config={"fusion_backend_config":{"kind":"__triton_gemm"}}',
        before=DOT_FUSION,
    )
    assert kernel.kind == "thin product"
    assert kernel.flops == 2 * 7 * 3 * 4 * 5
    assert kernel.moved == 2 * 7 * (12 + 20 + 15)
    assert kernel.origin == "jit(f)/experts"


# What XLA makes of a product in a scan over layers: it reads its layer of the stacked weights and
# writes its layer of the stacked results in place.
STACK_FUSION = f"""
%dynamic-slice-fusion (x: f32[3,4], w: f32[32,4,5], y: f32[32,3,5], i: s32[]) -> f32[32,3,5] {{
  %x = f32[3,4]{{1,0}} parameter(0)
  %w = f32[32,4,5]{{2,1,0}} parameter(1)
  %y = f32[32,3,5]{{2,1,0}} parameter(2)
  %i = s32[] parameter(3)
  %zero = s32[] constant(0)
  %layer = f32[1,4,5]{{2,1,0}} dynamic-slice(%w, %i, %zero, %zero), dynamic_slice_sizes={{1,4,5}}
  %matrix = f32[4,5]{{1,0}} bitcast(%layer)
  %product = (f32[3,5]{{1,0}}, s8[99]{{0}}) custom-call(%x, %matrix), {PRODUCT}
  %result = f32[3,5]{{1,0}} get-tuple-element(%product), index=0
  %workspace = s8[99]{{0}} get-tuple-element(%product), index=1
  %row = f32[1,3,5]{{2,1,0}} bitcast(%result)
  %stack = f32[32,3,5]{{2,1,0}} dynamic-update-slice(%y, %row, %i, %zero, %zero)
  ROOT %out = (f32[32,3,5]{{2,1,0}}, s8[99]{{0}}) tuple(%stack, %workspace)
}}
"""


def test_of_stacked_layers_only_the_slices_are_moved():
    kernel = _only(
        "%x = f32[3,4]{1,0} parameter(0)",
        "%w = f32[32,4,5]{2,1,0} parameter(1)",
        "%y = f32[32,3,5]{2,1,0} parameter(2)",
        "%i = s32[] parameter(3)",
        "ROOT %out = (f32[32,3,5]{2,1,0}, s8[99]{0}) fusion(%x, %w, %y, %i), kind=kCustom, "
        "calls=%dynamic-slice-fusion",
        before=STACK_FUSION,
    )
    assert kernel.flops == 120
    # x, one layer of w, the index, and one layer of y; no stack, and not the workspace.
    assert kernel.moved == 4 * (12 + 20 + 1 + 15)


@pytest.mark.parametrize(
    ("left", "right", "attributes", "result", "flops"),
    [
        # [3, 4] x [4, 5], and [4, 3]' x [5, 4]'.
        ("3,4", "4,5", "dim_labels=bf_io->bf", "3,5", 2 * 3 * 4 * 5),
        ("4,3", "5,4", "dim_labels=fb_oi->bf", "3,5", 2 * 3 * 4 * 5),
        # Seven products [3, 4] x [4, 5].
        ("3,4,7", "7,5,4", "window={size=7}, dim_labels=bf0_0oi->b0f", "3,7,5", 2 * 7 * 3 * 4 * 5),
        # Contracted over 4 and 6; rows of 3 and 6; columns of 5 and 6.
        ("3,4,6", "6,5,4", "window={size=6}, dim_labels=bf0_0oi->b0f", "3,1,5", 2 * 3 * 4 * 6 * 5),
        ("3,4,6", "1,5,4", "window={size=1}, dim_labels=bf0_0oi->b0f", "3,6,5", 2 * 3 * 6 * 4 * 5),
        ("3,4,1", "6,5,4", "window={size=6}, dim_labels=bf0_0oi->b0f", "3,6,5", 2 * 3 * 4 * 5 * 6),
    ],
)
def test_a_product_of_a_tpu_is_a_convolution(left, right, attributes, result, flops):
    kernel = _only(
        f"%x = f32[{left}]{{1,0}} parameter(0)",
        f"%w = f32[{right}]{{1,0}} parameter(1)",
        f"ROOT %y = f32[{result}]{{1,0}} convolution(%x, %w), {attributes}",
    )
    assert (kernel.kind, kernel.flops) == ("thin product", flops)


def test_arrays_in_the_fast_memory_of_a_tpu_are_free():
    text = _program(
        "%p = f32[10]{0} parameter(0)",
        "%b = (f32[10]{0:T(128)S(1)}, f32[10]{0}, u32[]{:S(2)}) copy-start(%p)",
        "%c = f32[10]{0:T(128)S(1)} copy-done(%b)",
        'ROOT %a = f32[10]{0:T(128)S(1)} custom-call(), custom_call_target="AllocateBuffer"',
        "%n = f32[10]{0} negate(%c)",
    )
    moved = {kernel.kind: kernel.moved for kernel in roofline(text, ROUND).kernels}
    assert moved == {"asynchronous copy": 40, "negate": 40}  # one read, one written


@pytest.mark.parametrize(
    ("call", "sent"),
    [
        # Of eight chips each sends seven eighths of the whole array, of 40 bytes.
        ("f32[10]{0} all-gather(%p), replica_groups=[1,8]<=[8], dimensions={0}", 35),
        ("f32[10]{0} all-reduce(%p), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%sum", 70),
        ("f32[10]{0} all-reduce-start(%p), replica_groups={{0,1},{2,3}}, to_apply=%sum", 40),
        ("f32[1]{0} reduce-scatter(%p), replica_groups=[2,4]<=[8], to_apply=%sum", 30),
        ("(f32[10]{0}, f32[20]{0}) all-gather-start(%p), replica_groups=[4,2]<=[8]", 40),
    ],
)
def test_a_collective_takes_the_time_of_what_it_sends(call, sent):
    kernel = _only("%p = f32[10]{0} parameter(0)", f"ROOT %y = {call}")
    assert kernel.kind == "collective"
    assert kernel.seconds == pytest.approx(kernel.moved / 10 + 0.5 + sent / 5)


SLICES = """
%two_slices (p: f32[10]) -> f32[2] {
  %p = f32[10]{0} parameter(0)
  %first = f32[2]{0} slice(%p), slice={[0:2]}
  %flat = f32[10]{0} bitcast(%p)
  %last = f32[2]{0} slice(%flat), slice={[8:10]}
  ROOT %sum = f32[2]{0} add(%first, %last)
}

%slice_and_all (q: f32[10]) -> f32[10] {
  %q = f32[10]{0} parameter(0)
  %part = f32[1]{0} slice(%q), slice={[0:1]}
  %number = f32[] bitcast(%part)
  %all = f32[10]{0} broadcast(%number), dimensions={}
  ROOT %scaled = f32[10]{0} multiply(%q, %all)
}
"""


@pytest.mark.parametrize(
    ("fusion", "kind", "moved"),
    [
        ("f32[2]{0} fusion(%p), kind=kLoop, calls=%two_slices", "elementwise", 4 * (2 + 2 + 2)),
        ("f32[10]{0} fusion(%p), kind=kInput, calls=%slice_and_all", "reduction", 4 * (10 + 10)),
        (
            'f32[10]{0} fusion(%p), kind=kCustom, calls=%slice_and_all, config={"kind":"__triton"}',
            "Triton fusion",
            4 * (10 + 10),
        ),
        # The result stands between the operands and a counter in the type of what is begun.
        (
            "((f32[10]{0}), f32[2]{0}, u32[]) fusion-start(%p), kind=kLoop, calls=%two_slices",
            "asynchronous copy",
            4 * (2 + 2 + 2),
        ),
        ("(f32[10]{0}, f32[10]{0}, u32[]) copy-start(%p)", "asynchronous copy", 4 * (10 + 10)),
        ("f32[10]{0} copy(%p)", "copy", 4 * (10 + 10)),
        ("f32[3]{0} slice(%p), slice={[0:3]}", "slice", 4 * (3 + 3)),
        ("f32[10]{0} dynamic-update-slice(%p, %row, %i)", "dynamic-update-slice", 4 * (3 + 3)),
        (
            '(f32[10]{0}, u8[77]{0}) custom-call(%p), custom_call_target="__cub$Sort"',
            "__cub$Sort",
            4 * (10 + 10),
        ),
    ],
)
def test_bytes_of_other_kernels(fusion, kind, moved):
    kernel = _only(
        "%p = f32[10]{0} parameter(0)",
        "%row = f32[3]{0} parameter(1)",
        "%i = s32[] parameter(2)",
        f"ROOT %out = {fusion}",
        before=SLICES,
    )
    assert (kernel.kind, kernel.flops, kernel.moved) == (kind, 0, moved)
    assert kernel.seconds == moved / 10 + 0.5


LOOPS = """
%inner_body (s: (s32[], f32[10])) -> (s32[], f32[10]) {
  %s = (s32[], f32[10]{0}) parameter(0)
  %v = f32[10]{0} get-tuple-element(%s), index=1
  %n = s32[] get-tuple-element(%s), index=0
  %w = f32[10]{0} negate(%v)
  ROOT %t = (s32[], f32[10]{0}) tuple(%n, %w)
}

%condition (s: (s32[], f32[10])) -> pred[] {
  %s.1 = (s32[], f32[10]{0}) parameter(0)
  %n.1 = s32[] get-tuple-element(%s.1), index=0
  %c = s32[] constant(3)
  ROOT %less = pred[] compare(%n.1, %c), direction=LT
}

%outer_body (s: (s32[], f32[10])) -> (s32[], f32[10]) {
  %s.2 = (s32[], f32[10]{0}) parameter(0)
  %started = ((f32[10]{0}), f32[2]{0}, u32[]) fusion-start(%v.2), kind=kLoop, calls=%two_slices
  %v.2 = f32[10]{0} get-tuple-element(%s.2), index=1
  %done = f32[2]{0} fusion-done(%started)
  ROOT %loop = (s32[], f32[10]{0}) while(%s.2), condition=%condition, body=%inner_body, \
backend_config={"known_trip_count":{"n":"3"},"known_init_step":{"init":"0","step":"1"}}
}
"""


def test_loops_within_loops_run_as_often_as_both_say():
    text = _program(
        "%s = (s32[], f32[10]{0}) parameter(0)",
        "ROOT %loop = (s32[], f32[10]{0}) while(%s), condition=%condition, body=%outer_body, "
        'backend_config={"known_trip_count":{"n":"32"}}',
        before=SLICES + LOOPS,
    )
    model = roofline(text, ROUND)
    assert {kernel.kind: kernel.launches for kernel in model.kernels} == {
        "asynchronous copy": 32,
        "negate": 96,
    }
    # A copy moves 24 bytes and takes 2.4 + 0.5 s; the negation 80 bytes and 8.5 s.
    assert model.total.kernels == 128
    assert model.total.moved == 32 * 24 + 96 * 80
    assert model.total.seconds == pytest.approx(32 * 2.9 + 96 * 8.5)
    assert list(model.kinds) == ["negate", "asynchronous copy"]  # the longest first
    assert model.kinds["negate"].seconds == pytest.approx(96 * 8.5)
    assert grouped(model.kernels, lambda kernel: "all") == {"all": model.total}
    assert model.unknown_loops == 0


def test_a_loop_without_a_stated_length_has_that_of_its_condition():
    text = _program(
        "%s = (s32[], f32[10]{0}) parameter(0)",
        "ROOT %loop = (s32[], f32[10]{0}) while(%s), condition=%condition, body=%inner_body",
        before=SLICES + LOOPS,
    )
    model = roofline(text, ROUND)
    assert (model.total.kernels, model.unknown_loops) == (3, 0)


def test_a_loop_of_unknown_length_counts_once_and_is_reported():
    text = _program(
        "%s = (s32[], f32[10]{0}) parameter(0)",
        "ROOT %loop = (s32[], f32[10]{0}) while(%s), condition=%condition, body=%inner_body",
        before=SLICES + LOOPS.replace("direction=LT", "direction=GT"),
    )
    model = roofline(text, ROUND)
    assert (model.total.kernels, model.unknown_loops) == (1, 1)


BRANCHES = """
%one (a: f32[10]) -> f32[10] {
  %a = f32[10]{0} parameter(0)
  ROOT %b = f32[10]{0} negate(%a)
}

%two (c: f32[10]) -> f32[10] {
  %c = f32[10]{0} parameter(0)
  %d = f32[10]{0} negate(%c)
  ROOT %e = f32[10]{0} sine(%d)
}
"""


@pytest.mark.parametrize(
    ("call", "kinds"),
    [
        ("call(%x), to_apply=%two", ["negate", "sine"]),
        ("conditional(%i, %x, %x), branch_computations={%one, %two}", ["negate", "sine"]),
        (
            "conditional(%c, %x, %x), true_computation=%two, false_computation=%one",
            ["negate", "sine"],
        ),
        ("async-start(%x), calls=%one", ["negate"]),
    ],
)
def test_called_computations_and_the_largest_branch_are_launched(call, kinds):
    text = _program(
        "%x = f32[10]{0} parameter(0)", f"ROOT %y = f32[10]{{0}} {call}", before=BRANCHES
    )
    assert [kernel.kind for kernel in roofline(text, ROUND).kernels] == kinds


def _attention(target, mask, results, *operands):
    config = (
        'backend_config={"operation_queue_id": "0", "cudnn_fmha_backend_config": {"fmha_scale": 1.0'
        ', "intermediate_tensor_shape": {"dimensions": ["2", "3", "8", "8"]}, '
        f'"mask_type": {mask}, "bmm1_dot_dimension_numbers": '
        '{"lhs_contracting_dimensions": ["3"]}}}'
    )
    lines = [f"%o{i} = {shape} parameter({i})" for i, shape in enumerate(operands)]
    names = ", ".join(f"%o{i}" for i in range(len(operands)))
    call = f'custom-call({names}), custom_call_target="{target}", {config}'
    return _only(*lines, f"ROOT %attended = ({results}, u8[0]{{0}}) {call}")


ROWS = "bf16[2,8,3,5]{3,2,1,0}"  # 2 rows of 8 positions, 3 heads of 5 channels: 480 bytes


@pytest.mark.parametrize(
    ("mask", "pairs"),
    [
        ('"NO_MASK"', 64),
        ('"CAUSAL"', 32),  # half of 8 x 8
        ('"CAUSAL", "sliding_window_length": 2', 14),  # 8 x 2, without half of 2 x 2 at the start
    ],
)
def test_attention_counts_what_its_mask_leaves(mask, pairs):
    target = "__cudnn$fmhaSoftmax"
    kernel = _attention(target, mask, f"{ROWS}, f32[2,3,8]{{2,1,0}}", ROWS, ROWS, ROWS)
    assert kernel.kind == "attention"
    # Two products with 5 channels of 3 heads in 2 rows, two operations for a multiply-add.
    assert kernel.flops == 2 * 2 * 5 * 3 * 2 * pairs
    assert kernel.moved == 4 * 480 + 192
    assert kernel.seconds == max(kernel.flops / 2, 211.2) + 0.5


def test_the_backward_pass_of_attention_has_five_products():
    kernel = _attention(
        "__cudnn$fmhaSoftmaxBackward",
        '"CAUSAL"',
        f"{ROWS}, {ROWS}, {ROWS}",
        *[ROWS] * 3,
        "f32[2,3,8]{2,1,0}",
        *[ROWS] * 2,
    )
    assert kernel.kind == "attention backward"
    assert kernel.flops == 5 * 2 * 5 * 3 * 2 * 32
    assert kernel.moved == 8 * 480 + 192
    assert kernel.seconds == 9600 / 4 + 0.5


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("f32[]", 4),
        ("bf16[2,3]{1,0}", 12),
        ("pred[7]", 7),
        ("f8e4m3fn[4]", 4),
        ("u4[10]{0:E(4)}", 5),
        ("c64[2]", 16),
        ("(s32[], /*index=1*/s64[3]{0})", 28),
    ],
)
def test_bytes_of_types(text, size):
    assert sum(array.bytes for array in arrays_of(text)) == size


def test_text_that_is_not_a_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        parse_module("HloModule empty")
