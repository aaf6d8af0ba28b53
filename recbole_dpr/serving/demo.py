"""`recbole-dpr demo`: a web page where a prompt is typed and two lists are compared.

Nothing is asked of any other host: Gradio's analytics are off, its fonts are the system's, and a
Content-Security-Policy lets the browser load from this server alone. What people or data files wrote is escaped here
(`gr.HTML` does not) before it becomes part of the page.
"""

import os
from dataclasses import dataclass, replace
from html import escape

from recbole_dpr.errors import UserError
from recbole_dpr.prompts.intent import Clause
from recbole_dpr.serving.recommender import MAX_PROMPT
from recbole_dpr.serving.terminal import mark

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

_SHOWN = 10  # items of a list
_USERS_OFFERED = 1000  # any other id can be typed
_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
_CSS = """
.lists {display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); gap: 1.5rem}
.lists h3 {margin: 0 0 .5rem}
.lists ol {list-style: none; margin: 0; padding: 0}
.lists li {display: grid; grid-template-columns: 1.8rem 1fr auto; gap: 0 .4rem; padding: .45rem 0; border-top: 1px solid var(--border-color-primary)}
.lists .rank, .lists .categories, .said {opacity: .7}
.lists .title {overflow-wrap: anywhere}
.lists .categories {grid-column: 2 / -1; font-size: .8rem}
.lists .move {font-size: .8rem; white-space: nowrap}
.lists .up {color: #15803d} .lists .down {color: #b45309}
.dark .lists .up {color: #4ade80} .dark .lists .down {color: #fbbf24}
.problem {padding: .6rem .8rem; margin-bottom: 1rem; border-left: 4px solid #b91c1c; background: var(--background-fill-secondary); overflow-wrap: anywhere}
.wishes label {border-radius: 999px; border: 1px solid #b45309}
.wishes label.selected {border-color: #15803d}
"""


@dataclass(frozen=True)
class Conversation:
    """What was typed so far, and the wishes it holds; a follow-up adds to them.

    Attributes:
        said: prompts, in order; wishes: their clauses, of which one that comes again replaces the earlier.
    """

    said: tuple = ()
    wishes: tuple = ()

    def add(self, text, clauses):
        """With a text and what it asks for."""
        wishes = {clause.text.casefold(): clause for clause in (*self.wishes, *clauses)}
        return Conversation((*self.said, text.strip()), tuple(wishes.values()))

    def flip(self, wanted):
        """With the wishes at these places positive, the others negative."""
        intents = ("positive" if place in wanted else "negative" for place in range(len(self.wishes)))
        return replace(self, wishes=tuple(Clause(wish.text, intent) for wish, intent in zip(self.wishes, intents)))


class Page:
    """What the page's controls do; every method returns the new (Conversation, HTML of the lists).

    Args:
        rec: Recommender.
    """

    def __init__(self, rec):
        self.rec = rec

    def say(self, prompt, conversation, user, watched, strength):
        """A prompt was sent."""
        problem = ""
        if len(prompt) > MAX_PROMPT:
            problem = f"The prompt has {len(prompt):,} characters; {MAX_PROMPT:,} are the most."
        elif clauses := self.rec.clauses(prompt):
            conversation = conversation.add(prompt, clauses)
        return conversation, self._lists(conversation, user, watched, strength, problem)

    def flip(self, wanted, conversation, user, watched, strength):
        """A chip was clicked; wanted: the places, as text, of those that are ticked now."""
        conversation = conversation.flip({int(place) for place in wanted})
        return conversation, self._lists(conversation, user, watched, strength)

    def show(self, conversation, user, watched, strength):
        """The user, the history or the strength changed."""
        return conversation, self._lists(conversation, user, watched, strength)

    def example_prompts(self):
        """Prompts that fit the data at hand."""
        names = [name.lower() for name in self.rec.category_names[:4]]
        return [names[0], f"no {names[0]}", *(f"{a}, but no {b}" for a, b in zip(names[1:], names[2:]))]

    def _lists(self, conversation, user, watched, strength, problem=""):
        """Both lists as HTML, below what is wrong, if anything is."""
        user = str(user or "").strip()
        try:
            history = [*(self.rec.history(user) if user else ()), *(watched or ())]
            plain = self.rec.recommend(history, k=_SHOWN)
            found = self.rec.recommend(history, list(conversation.wishes), k=_SHOWN, strength=strength, explain=True)
        except UserError as error:
            return _problem(str(error))
        asked = self._list(found, [_move(*move) for move in zip(found.moves, found.plain_ranks)])
        if not found.clauses:
            asked = "<p>Type what you feel like, or what you do not.</p>"
        said = "".join(f"<li>{escape(text)}</li>" for text in conversation.said)
        return (
            f'{_problem(problem)}<p class="said">{len(history):,} items in the history</p>'
            f'<div class="lists"><section><h3>Without a prompt</h3>{self._list(plain, [""] * len(plain.items))}</section>'
            f'<section><h3>With your wishes</h3>{asked}</section></div>' + (f'<h4>You said</h4><ol class="said">{said}</ol>' if said else "")
        )

    def _list(self, found, moves):
        rows = (
            f'<li><span class="rank">{rank}</span><span class="title">{escape(self.rec.title(item))}</span>{move}'
            f'<span class="categories">{escape(", ".join(names))}</span></li>'
            for rank, (item, names, move) in enumerate(zip(found.items, found.categories, moves), start=1)
        )
        return f"<ol>{''.join(rows)}</ol>"


def _move(move, plain_rank):
    return f'<span class="move {"up" if move > 0 else "down"}">{mark(move, plain_rank)}</span>' if move else ""


def _problem(text):
    return f'<p class="problem" role="alert">{escape(text)}</p>' if text else ""


def build(rec):
    """The page for a Recommender, as gradio Blocks."""
    import gradio as gr

    page = Page(rec)

    def chips(conversation):
        """Every wish as a chip: ticked if it is wanted."""
        names = [f"{'wanted' if wish.intent == 'positive' else 'avoided'}: {wish.text}" for wish in conversation.wishes]
        ticked = [str(place) for place, wish in enumerate(conversation.wishes) if wish.intent == "positive"]
        choices = [(name, str(place)) for place, name in enumerate(names)]
        return gr.CheckboxGroup(choices=choices, value=ticked, visible=bool(names))

    def event(answer):
        """A method of the page as an event: conversation, chips, lists."""

        def run(*inputs):
            conversation, lists = answer(*inputs)
            return conversation, chips(conversation), lists

        return run

    with gr.Blocks(title="RecBole-DPR", analytics_enabled=False) as blocks:
        gr.Markdown("# Give users the wheel")
        conversation = gr.State(Conversation())
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                prompt = gr.Textbox(label="What do you feel like?", placeholder=page.example_prompts()[-1], max_length=MAX_PROMPT, elem_id="prompt")
                with gr.Row():
                    send = gr.Button("Steer", variant="primary", elem_id="send")
                    restart = gr.Button("Start over", elem_id="restart")
                wishes = gr.CheckboxGroup(
                    [], label="Understood as", info="A click turns a wish round", visible=False, elem_id="wishes", elem_classes="wishes"
                )
                strength = gr.Slider(0, 3, 1, step=0.25, label="Strength", info="0: no prompt, 1: as trained")
                users = [("a new user", ""), *rec.users[:_USERS_OFFERED]]
                user = gr.Dropdown(users, value="", label="User", allow_custom_value=True, visible=bool(rec.users), elem_id="user")
                watched = gr.Dropdown([(rec.title(item), item) for item in rec.items], multiselect=True, label="History: search titles", elem_id="watched")
                gr.Examples(page.example_prompts(), prompt, label="Try")
            with gr.Column(scale=2, min_width=320):
                lists = gr.HTML(page.show(Conversation(), "", [], 1.0)[1], elem_id="lists")
        context, outputs = [conversation, user, watched, strength], [conversation, wishes, lists]
        gr.on([prompt.submit, send.click], event(page.say), [prompt, *context], outputs).then(lambda: "", None, prompt)
        wishes.input(event(page.flip), [wishes, *context], outputs)
        gr.on([user.change, watched.change, strength.release], event(page.show), context, outputs)
        restart.click(event(lambda *others: page.show(Conversation(), *others)), context[1:], outputs)
    return blocks


def launch(rec, host="127.0.0.1", port=7860, block=True):
    """Serve the page until interrupted.

    Returns:
        the Blocks and its address, where `block` is False: the server runs on in threads until `close()`.

    Raises:
        UserError: gradio is not installed, or the address is taken.
    """
    if not isinstance(port, int) or not 0 < port < 65536:
        raise UserError(f"--port={port}: a number from 1 to 65535 is needed")
    try:
        import gradio as gr
        from starlette.middleware import Middleware
    except ImportError as error:
        raise UserError(f"the demo needs gradio ({error}): pip install 'gradio>=6,<7'") from None
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    blocks = build(rec).queue(default_concurrency_limit=8)
    try:
        _, address, _ = blocks.launch(
            **{"server_name": str(host), "server_port": port, "prevent_thread_lock": True, "quiet": True, "share": False},
            **{"ssr_mode": False, "footer_links": [], "theme": theme, "css": _CSS},
            app_kwargs={"middleware": [Middleware(_FromHereOnly)]},
        )
    except OSError as error:
        raise UserError(f"cannot serve on {host}, port {port} ({error}); name another with --host= or --port=") from None
    if not block:
        return blocks, address
    print(f"open {address} in a browser; Ctrl-C ends it", flush=True)
    blocks.block_thread()


class _FromHereOnly:
    """ASGI middleware: the browser may load from this server alone."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def with_policy(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", _POLICY.encode())]
            await send(message)

        await self.app(scope, receive, with_policy)
