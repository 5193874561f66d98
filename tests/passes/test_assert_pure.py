"""assert-pure: every node outside ai.onnx by its path, and the limits of runtimes."""

import re
from collections.abc import Iterator

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import GraphProto, ModelProto, NodeProto, helper, parser

from onnxforge import model_io
from onnxforge.core import Finding
from onnxforge.errors import CheckFailed, SpecError
from onnxforge.fidelity import difference
from onnxforge.passes.assert_pure import AssertPureAiOnnx
from onnxforge.registry import parse
from onnxforge.runtime.ceilings import Ceiling, ceiling
from onnxforge.runtime.kernels import releases
from support import fixtures
from support.models import Case, models

NESTED = """<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
nested (float[2] x, bool flag) => (float[2] y) {
  [call] y = local.outer(x, flag)
}
<domain: "local", opset_import: ["" : 17, "com.microsoft" : 1]>
outer (u, flag) => (v) {
  [choice] v = If(flag) <
    then_branch = yes () => (float[2] t) { [inner] t = If(flag) <
      then_branch = a () => (float[2] p) { [deep] p = com.microsoft.Gelu(u) },
      else_branch = b () => (float[2] q) { q = ai.onnx.Relu(u) }> },
    else_branch = no () => (float[2] e) { e = com.microsoft.FastGelu(u) }>
}"""

LOOPS = """<ir_version: 8, opset_import: ["" : 17, "org.example" : 1]>
loops (float[2] x, int64 trips, bool go) => (float[2] y) {
  [loop] y = Loop(trips, go, x) <
    body = step (int64 i, bool c, float[2] a) => (bool d, float[2] b) {
      d = Identity(c)
      [odd] b = org.example.Twist(a)
    }>
}"""

PURE = """<ir_version: 8, opset_import: [%s]>
pure (float[2] x) => (float[2] y) { [node] y = Relu(x) }"""


def read(text: str) -> ModelProto:
    return parser.parse_model(text)


def pure(imports: str = '"" : 17') -> ModelProto:
    return read(PURE % imports)


def warnings(model: ModelProto, **options: object) -> list[Finding]:
    result = AssertPureAiOnnx(**options).call(model_io.from_proto(model))
    assert not result.modified
    return list(result.findings)


def offences(model: ModelProto, **options: object) -> list[tuple[str, str]]:
    with pytest.raises(CheckFailed) as caught:
        warnings(model, **options)
    assert all(finding.level == "error" for finding in caught.value.findings)
    return [(finding.code, finding.where) for finding in caught.value.findings]


def test_the_text_of_a_failure_lists_every_node() -> None:
    with pytest.raises(CheckFailed) as caught:
        AssertPureAiOnnx().apply(fixtures.built("foreign"))
    assert str(caught.value).splitlines() == [
        "the model is not pure ai.onnx: 2 offences",
        "  OF101 /first/FusedConv: is com.microsoft::FusedConv",
        "  OF101 /y/If/then_branch//t/FusedConv: is com.microsoft::FusedConv",
    ]


def test_a_pure_model_passes_and_is_counted() -> None:
    model, report = AssertPureAiOnnx().apply(fixtures.built("speech_encoder"))
    assert report.passes[0].findings == ()
    assert report.passes[0].stats == {"nodes": len(list(model.graph)), "functions": 0}
    assert not report.modified


def test_the_model_is_the_same_afterwards() -> None:
    before = onnx.load(fixtures.built("hiding_places"))
    after, _ = AssertPureAiOnnx().apply(before)
    assert difference(before, after) is None


def test_a_function_is_as_pure_as_its_body() -> None:
    model = onnx.load(fixtures.built("impure_function"))
    assert offences(model) == [("OF101", "local::activated//v/Gelu")]
    found = warnings(model, allow=("com.microsoft",))
    assert [str(finding) for finding in found] == [
        "OF106 local::activated: is a function of the model"
    ]
    assert found[0].level == "warning"


def test_bodies_in_functions_are_searched() -> None:
    assert offences(read(NESTED)) == [
        ("OF101", "local::outer/choice/then_branch/inner/then_branch/deep"),
        ("OF101", "local::outer/choice/else_branch/FastGelu#0"),
    ]


def test_bodies_of_loops_are_searched() -> None:
    assert offences(read(LOOPS)) == [("OF101", "loop/body/odd")]


def test_a_call_of_a_function_that_is_not_there_is_foreign() -> None:
    model = read(NESTED)
    model.graph.node[0].op_type = "missing"
    found = offences(model, allow=("com.microsoft",))
    assert found == [("OF101", "call")]


def test_an_overload_that_is_not_there_is_foreign() -> None:
    model = onnx.load(fixtures.built("really_new_ir"))
    assert [finding.code for finding in warnings(model)] == ["OF106", "OF106"]
    model.graph.node[1].overload = "lost"
    assert offences(model) == [("OF101", "/y/dense")]


@pytest.mark.parametrize("domain", ["ai.onnx.ml", "ai.onnx.preview.training"])
def test_other_domains_of_onnx_are_not_pure(domain: str) -> None:
    model = pure(f'"" : 17, "{domain}" : 1')
    model.graph.node[0].domain = domain
    assert offences(model) == [("OF101", "node")]
    assert warnings(model, allow=(domain,)) == []


def test_both_spellings_of_the_standard_domain_are_one() -> None:
    model = pure('"ai.onnx" : 17')
    model.graph.node[0].domain = "ai.onnx"
    assert warnings(model, opset=17, imports="all") == []
    assert offences(model, opset=18) == [("OF103", "model")]


def test_forbidden_operators_are_found_in_any_domain_or_in_one() -> None:
    model = onnx.load(fixtures.built("foreign"))
    allow = ("com.microsoft",)
    fused = [("OF105", "/first/FusedConv"), ("OF105", "/y/If/then_branch//t/FusedConv")]
    assert offences(model, allow=allow, forbid=("FusedConv",)) == fused
    assert offences(model, allow=allow, forbid=("com.microsoft::FusedConv",)) == fused
    assert offences(model, allow=allow, forbid=("If", "Relu")) == [("OF105", "/y/If")]
    for standard in ("::Conv", "ai.onnx::Conv", "Conv"):
        found = offences(model, allow=allow, forbid=(standard,))
        assert found == [("OF105", "/y/If/else_branch//e/Conv")]
    assert warnings(model, allow=allow, forbid=("ai.onnx::FusedConv",)) != []


def test_a_foreign_and_forbidden_operator_offends_twice() -> None:
    model = onnx.load(fixtures.built("impure_function"))
    where = "local::activated//v/Gelu"
    assert offences(model, forbid=("Gelu",)) == [("OF101", where), ("OF105", where)]


def test_an_unused_foreign_import_is_a_warning() -> None:
    model = onnx.load(fixtures.built("foreign"))
    found = warnings(model, allow=("com.microsoft",))
    assert [(str(finding), finding.level) for finding in found] == [
        ("OF102 model: imports org.example 3, which no node uses", "warning")
    ]
    assert warnings(model, allow=("com.microsoft", "org.example")) == []


def test_any_foreign_import_can_be_an_offence() -> None:
    model = onnx.load(fixtures.built("foreign"))
    model.graph.node.pop()
    model.graph.node[0].domain = ""
    assert offences(model, imports="all") == [("OF102", "model"), ("OF102", "model")]
    model = onnx.load(fixtures.built("impure_function"))
    assert offences(model, imports="all")[0] == ("OF102", "local::activated")


def test_an_import_is_used_only_where_it_holds() -> None:
    model = read(NESTED)
    model.opset_import.add(domain="org.example", version=1)
    model.functions[0].opset_import.add(domain="org.example", version=1)
    for graph in (attribute.g for attribute in model.functions[0].node[0].attribute):
        graph.node[0].domain = ""
        graph.node[0].op_type = "Identity"
        graph.node[0].input[:] = ["u"]
        del graph.node[0].attribute[:]
    found = warnings(model, allow=("com.microsoft",))
    assert [(finding.code, finding.where) for finding in found] == [
        ("OF102", "model"),
        ("OF106", "local::outer"),
        ("OF102", "local::outer"),
    ]
    model.functions[0].node[0].domain = "org.example"
    assert offences(model) == [("OF101", "local::outer/choice")]


def test_functions_can_be_offences() -> None:
    model = onnx.load(fixtures.built("really_new_ir"))
    found = [("OF106", "local::dense:grow"), ("OF106", "local::dense:keep")]
    assert offences(model, functions="forbid") == found


def test_the_opset_can_be_asked_for() -> None:
    model = onnx.load(fixtures.built("new_ir"))
    assert warnings(model, opset=20, max_opset=20, max_ir=10) == []
    assert offences(model, opset=19) == [("OF103", "model")]
    assert offences(model, opset=21) == [("OF103", "model")]
    assert offences(model, max_opset=19) == [("OF103", "model")]
    assert offences(model, max_ir=9) == [("OF104", "model")]


def test_functions_have_an_opset_of_their_own() -> None:
    model = onnx.load(fixtures.built("really_new_ir"))
    for imported in model.functions[1].opset_import:
        imported.version = 21
    assert offences(model, opset=20) == [("OF103", "local::dense:keep")]
    assert offences(model, max_opset=20) == [("OF103", "local::dense:keep")]
    assert offences(model, opset=21) == [("OF103", "model"), ("OF103", "local::dense:grow")]


def test_operators_need_an_import() -> None:
    model = pure('"ai.onnx.ml" : 3')
    assert offences(model) == [("OF103", "model")]


def test_without_operators_no_import_is_needed() -> None:
    model = read(NESTED)
    del model.opset_import[0]
    found = warnings(model, allow=("com.microsoft",), opset=17)
    assert [finding.code for finding in found] == ["OF106"]


@pytest.mark.parametrize(
    ("fixture", "release", "codes"),
    [
        ("new_ir", "1.17", ["OF104"]),
        ("new_ir", "1.17.3", ["OF104"]),
        ("new_ir", "1.18", []),
        ("opset_21_int4", "1.17", ["OF104", "OF103"]),
        ("opset_21_int4", "1.20.x", []),
        ("speech_encoder", "1.17", []),
    ],
)
def test_a_runtime_limits_ir_and_opset(fixture: str, release: str, codes: list[str]) -> None:
    model = onnx.load(fixtures.built(fixture))
    if codes:
        assert offences(model, min_ort=release) == [(code, "model") for code in codes]
    else:
        assert warnings(model, min_ort=release) == []


@pytest.mark.parametrize(
    ("body", "release", "reason"),
    [
        ("y = ConvInteger(x, w)", "1.23", "ConvInteger 17 of uint8, int8: no kernel"),
        ("y = ConvInteger(x, w)", "1.24", None),
        ("b = Cast <to=16> (x) c = Neg(b) y = Cast <to=6> (c)", "1.32", "Neg 17 of bfloat16"),
        ("y = foreign.Op(x)", "1.17", None),
    ],
)
def test_a_runtime_needs_a_kernel_for_each_node(
    body: str, release: str, reason: str | None
) -> None:
    text = '<ir_version: 8, opset_import: ["" : 17, "foreign" : 1]> g '
    model = parser.parse_model(
        f"{text}(uint8[1,1,4,4] x, int8[1,1,2,2] w) => (int32[a,b,c,d] y) {{ {body} }}"
    )
    allow = ("foreign",)
    if reason is None:
        assert warnings(model, min_ort=release, allow=allow) == []
        return
    with pytest.raises(CheckFailed, match=re.escape(reason)) as failed:
        warnings(model, min_ort=release, allow=allow)
    assert [finding.code for finding in failed.value.findings] == ["OF108"]


def test_the_tighter_limit_is_named() -> None:
    model = onnx.load(fixtures.built("opset_21_int4"))
    with pytest.raises(CheckFailed, match=r"at most 9 \(onnxruntime 1\.17\)"):
        warnings(model, max_ir=10, min_ort="1.17")
    with pytest.raises(CheckFailed, match=r"imports ai\.onnx 21, at most 19 \(max_opset\)"):
        warnings(model, max_opset=19, min_ort="1.17")


def test_a_runtime_of_the_future_is_taken_as_the_newest_known() -> None:
    found = warnings(pure(), min_ort="1.99")
    assert [(finding.code, finding.level) for finding in found] == [("OF107", "warning")]
    assert (
        f"onnxruntime 1.99 is not known yet, the limits are those of {releases()[-1]}"
        in str(found[0])
    )


@pytest.mark.parametrize(
    "options",
    ["opset=0", "max_opset=-1", "max_ir=0", "min_ort=1.16", "min_ort=new", "forbid=local::"],
)
def test_options_that_cannot_hold_are_refused(options: str) -> None:
    with pytest.raises(SpecError, match="assert-pure"):
        parse(f"assert-pure{{{options}}}")


def test_options_are_read_and_written() -> None:
    text = (
        "assert-pure{opset=20 max_opset=21 max_ir=9 min_ort=1.17 allow=ai.onnx.ml,local"
        " forbid=Gelu,com.microsoft::Attention imports=all functions=forbid}"
    )
    assert ",".join(map(str, parse(text))) == text


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (releases()[0], Ceiling("1.17", 9, 20)),
        ("1.17.0", Ceiling("1.17", 9, 20)),
        ("1.18", Ceiling("1.18", 10, 21)),
        ("1.19.*", Ceiling("1.19", 10, 21)),
        ("1.20.1", Ceiling("1.20", 10, 21)),
        ("1.21.1", Ceiling("1.21", 10, 22)),
        ("1.22.x", Ceiling("1.22", 10, 22)),
        ("1.23.2", Ceiling("1.23", 11, 23)),
        ("1.24", Ceiling("1.24", 13, 25)),
        ("1.25", Ceiling("1.25", 13, 26)),
        ("1.31.1", Ceiling("1.31", 13, 26)),
        ("1.32", Ceiling("1.32", 14, 28)),
        ("2.0", Ceiling(releases()[-1], 14, 28, is_known=False)),
    ],
)
def test_ceilings_are_those_that_were_measured(version: str, expected: Ceiling) -> None:
    assert ceiling(version) == expected


@pytest.mark.parametrize(
    "version", ["1.16", "1.9", "0.30", "1", "1.17.1.2", "v1.17", "", "1.x"]
)
def test_other_versions_have_no_ceiling(version: str) -> None:
    with pytest.raises(SpecError, match="onnxruntime"):
        ceiling(version)


def in_graph(graph: GraphProto, path: str) -> Iterator[tuple[str, NodeProto]]:
    """Every node below a graph with its path, by a plain walk over the proto."""
    for node in graph.node:
        yield path + node.name, node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from in_graph(attribute.g, f"{path}{node.name}/{attribute.name}/")


def all_nodes(model: ModelProto) -> dict[str, NodeProto]:
    found = dict(in_graph(model.graph, ""))
    for function in model.functions:
        body = helper.make_graph([], "", [], [])
        body.node.extend(function.node)
        found |= dict(in_graph(body, f"{function.domain}::{function.name}/"))
    return found


def some_nodes(model: ModelProto) -> st.SearchStrategy[set[str]]:
    called = {function.name for function in model.functions}
    names = [path for path, node in all_nodes(model).items() if node.op_type not in called]
    return st.sets(st.sampled_from(names)) if names else st.just(set())


@given(case=models(), data=st.data())
def test_exactly_the_foreign_nodes_are_found(case: Case, data: st.DataObject) -> None:
    model = case.model
    chosen = data.draw(some_nodes(model))
    for graph in [model.graph, *model.functions]:
        prefix = "" if isinstance(graph, GraphProto) else f"{graph.domain}::{graph.name}/"
        mark(graph.node, prefix, chosen)
    allowed = warnings(model, allow=("org.example",))
    assert [finding.code for finding in allowed].count("OF106") == len(model.functions)
    if chosen:
        found = offences(model)
        assert len(found) == len(chosen)
        assert set(found) == {("OF101", path) for path in chosen}
    else:
        assert warnings(model) == allowed


def mark(nodes: list[NodeProto], path: str, chosen: set[str]) -> None:
    """Move the chosen nodes into another domain."""
    for node in nodes:
        if path + node.name in chosen:
            node.domain = "org.example"
        for attribute in node.attribute:
            if attribute.HasField("g"):
                mark(attribute.g.node, f"{path}{node.name}/{attribute.name}/", chosen)
