"""What each release of onnxruntime did with the forms of fixtures/forms.py when tried."""

RELEASES = tuple(f"1.{minor}" for minor in range(17, 33))

# A letter for each release: . runs, L does not load, R loads and fails, S crashes.
_TRIED = {
    "................": """
        conv_u8 conv_no_zeros_ok matmul_flat_each_ok matmul_flat_one_ok
        matmul_batched_own_ok matmul_batched_one_ok matmul_s8_s8_ok qdq_flat_zero_ok
        weight_only_flat_zero_ok weight_only_batched_zero qdq_batched_ok
        weight_only_batched_ok qdq_batched_one_ok weight_only_batched_one_ok
        float16_weight_11 float16_matmul_11 float16_moved_11 float16_weight_13
        float16_matmul_13 float16_moved_13 float16_weight_20 float16_matmul_20
        float16_moved_20 bfloat16_weight_13 bfloat16_moved_13 bfloat16_weight_20
        bfloat16_moved_20 float16_Softmax float16_Relu float16_Erf float16_Gelu
        float16_Mish float16_HardSwish float16_Elu float16_Sigmoid float16_if
        float16_loop outside_table_ok op_gelu op_upsample op_range double_flat_ok
        double_gated_apart_ok double_matmul_relu_ok double_transposed_weight_ok
        half_weight_own_ok half_weight_overridable_twice_ok
        half_weight_overridable_native_ok half_cast_last_ok half_cast_native_ok
        half_cast_cast_ok gru_layout_0
    """,
    "RRRRRRRRRRRRRRRR": "conv_u8_each matmul_batched_each matmul_rows qdq_batched_zero",
    "LLLLLLL.........": "conv_s8 matmul_s8_u8 op_swish double_attention_0",
    "LLLLLLLRRRRRRRRR": "conv_s8_each",
    "SSSSS...........": "conv_no_x_zero",
    "LR..............": "blocks_s8",
    "LL..............": "blocks_s4",
    "LLLLLL..........": """
        cast_s4 float16_weight_23 float16_matmul_23 float16_moved_23 bfloat16_weight_23
        bfloat16_moved_23 op_rms
    """,
    "L...............": "weight_only_s16 double_gemm_relu",
    "LLLLLLLLLLLLLLLL": """
        bfloat16_weight_11 bfloat16_matmul_11 bfloat16_moved_11 bfloat16_matmul_13
        bfloat16_matmul_20 bfloat16_matmul_23 bfloat16_Softmax bfloat16_Relu
        bfloat16_Erf float16_Celu bfloat16_Celu bfloat16_Gelu bfloat16_Mish
        bfloat16_HardSwish bfloat16_Elu bfloat16_Sigmoid outside_shape outside_axes
        outside_repeats op_gelu_early op_upsample_late op_image op_nothing gru_layout_1
    """,
    "......SSSSSSSS..": "outside_empty",
    "LLLL............": "op_acos",
    "LLLLLLLLL.......": "double_transposed",
    "LLLLLLLLLLLLLL..": "double_gated half_cast_between",
    "......SSSSSSS...": "half_weight_overridable",
    "LLLLLLLLLLLLLLL.": "double_attention_1",
}

MEASURED = {name: letters for letters, names in _TRIED.items() for name in names.split()}
"""Letters of each form by its name."""
