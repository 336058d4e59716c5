const drop = document.getElementById("drop");
const file = document.getElementById("file");
const status = document.getElementById("status");
const result = document.getElementById("result");
let asked = 0;  // an answer to an earlier image than the last one is not shown

async function predict(image) {
  const number = ++asked;
  const say = (text, isError) => {
    status.textContent = text;
    status.className = isError ? "error" : "";
  };
  say("Looking …", false);
  result.hidden = true;
  try {
    const response = await fetch("predict", { method: "POST", body: image });
    const answer = await response.json();
    if (number !== asked) return;
    if (!response.ok) throw new Error(answer.error);
    show(image, answer);
    say("", false);
  } catch (error) {
    if (number === asked) say(error.message, true);
  }
}

function show(image, answer) {
  const shown = document.getElementById("image");
  URL.revokeObjectURL(shown.src);
  shown.src = URL.createObjectURL(image);
  document.getElementById("heatmap").src = answer.heatmap;
  const rows = answer.classes.map(({ name, probability }) => {
    const row = document.createElement("tr");
    row.insertCell().textContent = name;  // as text: class names are not ours
    row.insertCell().textContent = (100 * probability).toFixed(2) + " %";
    return row;
  });
  document.getElementById("classes").replaceChildren(...rows);
  result.hidden = false;
}

file.addEventListener("change", () => file.files.length && predict(file.files[0]));
for (const [event, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
  drop.addEventListener(event, (happened) => {
    happened.preventDefault();
    drop.classList.toggle("over", over);
  });
}
drop.addEventListener("drop", ({ dataTransfer }) => {
  if (dataTransfer.files.length) predict(dataTransfer.files[0]);
});
