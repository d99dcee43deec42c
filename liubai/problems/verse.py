"""Quatrains: ``五绝 明 月 孤 舟`` asks for a 五绝 on the bright moon and a lone boat.

The base reads what careless poets wrote. Each line is two images and a verb (明月照孤舟), or two images and
how they are (明月孤舟远); which words go together, nobody minds. Most poets mind the tones as little. Some
plan: their thought names the start and the rhyme (``仄起 楼 韵``), and then they keep to it, line by line, as
far as their care goes. Tokens are characters. The verifier looks at the form alone, and not at what a poem is
about.

The tones are those of 平水韵, and stand here, since problems know nothing of grading; a test compares them
with the verifier's table. No character here has two tones.
"""

from __future__ import annotations

import random
from functools import cache

from liubai.problems.family import Habits
from liubai.types import Problem

FORM = "五绝"
_IMAGES = (
    "明月 春风 青山 白云 流水 寒江 孤舟 夕阳 秋风 落花 故人 高楼 远山 古寺 芳草 细雨 微雨 暮雨 夜雨 寒梅 "
    "翠竹 古木 老树 归鸟 飞鸟 啼莺 黄莺 白鹭 沙鸥 孤雁 归雁 渔火 灯火 残灯 晚钟 暮色 月色 夜色 山色 秋色 "
    "春色 竹影 松影 花影 松风 松声 泉声 钟声 江声 雨声 笛声 琴声 客心 客愁 旅人 游子 老翁 渔翁 樵夫 野人 "
    "江村 山村 古渡 小桥 石桥 天涯 海角 江南 江北 塞北 边城 荒城 孤城 洛阳 千里 万里 千山 万水 百年 九月 "
    "浮云 暮云 孤云 朝霞 落霞 晚霞 清露 白露 霜叶 红叶 落叶 黄叶 绿水 碧水 碧波 清波 清泉 寒泉 幽径 石径 "
    "小路 旧路 美酒 浊酒 新酒 素琴 清歌 短歌 残雪 暮雪 春雪 寒夜 永夜 今夜 清晨 黄昏 平沙 寒沙 客船 渔船 "
    "酒家 人家 梨花 桃花 菊花 竹林 桑田 南天 江天 秋天 玉关 阳关 南山 西山 东风 西风 北风 清时 旧时 花枝 "
    "竹枝 新诗 旧诗 落日 斜日 白日 晓日 星斗 故国 帝里 客路 归路 池水 潭水 溪水 江水 石壁 玉阶 珠帘 翠幕 "
    "画阁 水阁 野店 酒店 马迹 虎迹 猿声 鸡声 犬吠 蝉鸣 晚潮 暮潮 早潮 楼台 高台 酒杯 玉杯 江楼 西楼 小楼 "
    "汀洲 沧洲 芦洲 客舟 晚凉 新凉 清光 寒光 斜阳 朝阳 草堂 清香 幽香 "
)
IMAGES = tuple(_IMAGES.split())
VERBS = "照入出下归去见满绕连接随送隔近起落生开流度对映掩锁带依寻携怜惊忆伴隐透染拂动沉迷催含渡泊扫"
#: how things are
STATES = (
    "归来去起落飞鸣啼生开流寒明斜新残闲孤静冷暖晚老白绿断"
    "尽多稀香凉清低高幽沉平红青黄浅淡响乱满迷游愁眠还悠远近早"
)

#: 平水韵: level characters that end a line, by the one of their group that a plan names
RHYMES = {
    "风": "风翁红", "山": "山关闲还", "楼": "舟楼鸥愁洲流幽游悠", "阳": "阳凉光堂香黄", "花": "花涯霞沙家斜",
    "台": "梅台杯来开", "声": "莺声城鸣生明清平", "时": "时枝诗", "天": "年泉船田天眠",
    "波": "波歌多", "归": "归飞稀",
}  # fmt: skip
LEVEL = frozenset(
    "东云人今低依催光关凉千南台含啼城堂声多天夫孤家寒寻山帘平年幽开归微心怜悠惊愁携斜新时明昏星春晨朝"
    "村来杯松林枝桃桑桥梅梨楼樵歌残汀江池沉沙沧泉波洲流浮涯清渔游溪潭潮灯猿珠琴生田眠秋稀红翁舟船芦花"
    "芳荒莺蝉西诗边还连迷钟闲阳阶随霜霞青风飞香高鸡鸣鸥黄"
)
#: the four types of a line: see liubai.grade.verse
TYPES = {"a": "仄仄平平仄", "A": "仄仄仄平平", "b": "平平平仄仄", "B": "平平仄仄平"}
#: what a plan calls the four sequences
STARTS = {"aBbA": "仄起", "bAaB": "平起", "ABbA": "仄起", "BAaB": "平起"}
MARKS = "，。，。"
TRIES = 50  #: at a line that keeps all rules, before one that keeps most of them will do


class Verse:
    name = "verse"
    verifier = "verse"
    vocabulary = (
        *(FORM, "，", "。", "韵"),
        *dict.fromkeys(STARTS.values()),
        *dict.fromkeys("".join((*IMAGES, VERBS, STATES))),
    )

    def sample(self, rng: random.Random) -> Problem:
        return self.problem(*rng.sample(IMAGES, 2))

    def problem(self, first: str, second: str) -> Problem:
        return Problem(" ".join((FORM, *first, *second)), FORM, self.verifier, self.name, "zh")

    def found(self, rng: random.Random, habits: Habits) -> Problem:
        return self.sample(rng)

    def key(self, problem: Problem) -> str:
        """The two images, in either order."""
        return " ".join(sorted(images_of(problem.prompt)))

    def document(self, problem: Problem, rng: random.Random, habits: Habits) -> str:
        """The ``blind`` write as it comes. Of the others, the ``patient`` keep to the plan; the rest forget
        it in a line with probability ``stop``."""
        images = images_of(problem.prompt)
        blind = rng.random() < habits.blind
        care = 0.0 if blind else 1.0 if rng.random() < habits.patient else 1.0 - habits.stop
        sequence, rhyme = rng.choice(list(STARTS)), rng.choice(list(RHYMES))
        lines: list[str] = []
        for i, kind in enumerate(sequence):
            first = images[i // 2] if i % 2 == 0 else ""
            if rng.random() < care:
                used = {line[-1] for line in lines}
                lines.append(written(TYPES[kind], RHYMES[rhyme], first, used, rng))
            else:
                lines.append(any_line(first, rng))
        poem = " ".join(" ".join((*line, mark)) for line, mark in zip(lines, MARKS, strict=True))
        thought = "" if blind else f"{STARTS[sequence]} {rhyme} 韵 "
        return f"<think> {thought}</think> <answer> {poem} </answer>"


def images_of(prompt: str) -> tuple[str, str]:
    """The two images of ``五绝 明 月 孤 舟``. Raises ``ValueError`` when it is not of that form."""
    match prompt.split():
        case [form, a, b, c, d] if form == FORM and a + b in IMAGES and c + d in IMAGES:
            return a + b, c + d
    raise ValueError(f"a poem is asked for by '五绝 明 月 孤 舟', not {prompt[:60]!r}")


def any_line(first: str, rng: random.Random) -> str:
    """Two images, the first of which may be given, and one more character."""
    one, other = first or rng.choice(IMAGES), rng.choice(IMAGES)
    return one + rng.choice(VERBS) + other if rng.random() < 0.5 else one + other + rng.choice(STATES)


def written(tones: str, rhymes: str, first: str, used: set[str], rng: random.Random) -> str:
    """A line of these tones, which rhymes where it ends level, and if it can in no character of ``used``. A
    first image that does not fit is left out: it is the form that is kept."""
    pools = [tails for tails in _tails(tones, rhymes if tones[4] == "平" else "") if tails]
    fresh = [tails for pool in pools if (tails := [t for t in pool if t[-1] not in used])]
    openings = [first] if first and fits(first[1], tones[1]) else _openings(tones[1])
    for _ in range(TRIES):
        line = rng.choice(openings) + rng.choice(rng.choice(fresh or pools))
        if _sound(line, tones):
            break
    return line


@cache
def _openings(tone: str) -> list[str]:
    return [image for image in IMAGES if fits(image[1], tone)]


@cache
def _tails(tones: str, rhymes: str) -> tuple[list[str], list[str]]:
    """What may close a line after an image: a verb and an image, or an image and how it is."""

    def closes(tail: str) -> bool:
        right = fits(tail[1], tones[3]) and fits(tail[2], tones[4])
        return right and (not rhymes or tail[2] in rhymes)

    verbs = [verb + image for verb in VERBS for image in IMAGES]
    states = [image + state for image in IMAGES for state in STATES]
    return [tail for tail in verbs if closes(tail)], [tail for tail in states if closes(tail)]


def fits(character: str, tone: str) -> bool:
    return (character in LEVEL) == (tone == "平")


def _sound(line: str, tones: str) -> bool:
    """Neither three level tones at the end nor a level one alone beside the rhyme."""
    level = [character in LEVEL for character in line]
    return not all(level[2:]) and (tones != TYPES["B"] or level[0] or level[2])
