"""What the README shows, pasted into a new notebook, on a model that is nobody's but the user's."""

import json
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

PAGE = (Path(__file__).parents[1] / "README.md").read_text()

THEIRS = """
import functools, torch
from workbench import explore

torch.manual_seed(0)
x = torch.randn(1500, 12); y = (x[:, :3] @ torch.randn(3, 4)).argmax(1)
x, x_test, y, y_test = x[:1200], x[1200:], y[:1200], y[1200:]
net = torch.nn.Sequential(torch.nn.Linear(12, 64), torch.nn.Tanh(), torch.nn.Linear(64, 4))
adam = torch.optim.Adam(net.parameters(), 0.01)
for _ in range(100):
    adam.zero_grad(); torch.nn.functional.cross_entropy(net(x), y).backward(); adam.step()
# A search takes as long as you let it.
explore.search = functools.partial(explore.search, candidates=8, seeds=1, progress=False)
"""
ASKED = """
import json, urllib.request
assert frame["error"].eq("").all() and list(frame["name"]) == ["mine", "int8"]
assert torch.equal(again(x_test), small(x_test))
assert same and trained(x_test).shape == (300, 4)
question = json.dumps({"inputs": x_test[:2].tolist()}).encode()
headers = {"Content-Type": "application/json"}
request = urllib.request.Request(f"{service.url}/predict", question, headers)
print(urllib.request.urlopen(request).read().decode())
service.stop()
"""


def test_every_example_works_on_the_users_own_model(tmp_path):
    examples = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(examples) >= 6
    cells = [nbformat.v4.new_code_cell(source) for source in (THEIRS, *examples, ASKED)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    (picture,) = [out for out in cells[1].outputs if "image/png" in out.get("data", {})]
    assert picture["output_type"] == "execute_result"
    (answer,) = cells[-1].outputs
    assert len(json.loads(answer["text"])["classes"]) == 2
    assert (tmp_path / "report.html").stat().st_size < 3_000_000
    assert (tmp_path / "small.safetensors").is_file()
