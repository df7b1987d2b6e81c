"""A little Chinese: greetings, colours, animals, short stories and stated facts. Written for this project."""

from __future__ import annotations

from random import Random

NAMES = ("小明", "小红", "小雨", "小山", "小月", "小林", "阿明", "阿花")
ANIMALS = (
    ("猫", "鱼"),
    ("狗", "肉"),
    ("兔子", "萝卜"),
    ("牛", "草"),
    ("马", "草"),
    ("鸟", "虫子"),
    ("熊", "蜂蜜"),
    ("猴子", "香蕉"),
    ("羊", "草"),
)
PLACES = ("花园里", "森林里", "河边", "山上", "村子里", "海边", "学校里")
THINGS = ("球", "书", "帽子", "灯", "杯子", "风筝", "鞋子", "盒子")
SPOTS = ("桌子上", "床下", "门后", "树下", "箱子里", "窗边", "椅子上")
COLOURS = ("红色", "蓝色", "绿色", "黄色", "白色", "黑色")
COLOUR_OF = (("天空", "蓝色"), ("草", "绿色"), ("雪", "白色"), ("太阳", "黄色"), ("苹果", "红色"), ("大海", "蓝色"))
DIGITS = "零一二三四五六七八九十"
FIXED = (
    ("你好", "你好！很高兴见到你。"),
    ("你好！", "你好！很高兴见到你。"),
    ("你是谁？", "我是一个很小的语言模型。我喜欢讲故事。"),
    ("谢谢", "不客气！"),
    ("谢谢你！", "不客气！"),
    ("再见", "再见！"),
    ("早上好", "早上好！今天天气很好。"),
    ("晚安", "晚安！做个好梦。"),
    ("你会做什么？", "我会讲故事，也会回答简单的问题。"),
    ("你会说中文吗？", "会一点。"),
)


def story(random: Random, animal: str, place: str, name: str) -> str:
    """Five or six short sentences about an animal."""
    thing, colour, spot = random.choice(THINGS), random.choice(COLOURS), random.choice(SPOTS)
    friend = random.choice([each for each in NAMES if each != name])
    first = random.choice(
        (f"从前，{place}有一只小{animal}，名字叫{name}。", f"{place}住着一只小{animal}，它叫{name}。")
    )
    middle = random.choice(
        (
            f"{name}有一个{colour}的{thing}。有一天，{thing}不见了。{name}很难过。{friend}说：“别担心，我们一起找。”最后，他们在{spot}找到了{thing}。",
            f"有一天，下雨了。{name}没有伞，很难过。{friend}说：“来我家吧。”他们一起喝茶，听雨的声音。",
            f"有一天，{name}想去山上看太阳，可是山很高。{friend}说：“我们一起走。”他们慢慢地走，最后看到了太阳。",
        )
    )
    last = random.choice(
        (f"{name}很高兴，说：“谢谢你，{friend}！”", f"从那天起，{name}和{friend}是好朋友。", "大家都很高兴。")
    )
    return first + middle + last


def question(random: Random) -> tuple[str, str, str]:
    """(question, reasoning, answer)."""
    roll = random.random()
    if roll < 0.2:
        asked, answer = random.choice(FIXED)
        return asked, "我应该有礼貌地回答。", answer
    if roll < 0.5:
        animal, place, name = random.choice(ANIMALS)[0], random.choice(PLACES), random.choice(NAMES)
        asked, plan = random.choice(
            (
                (f"请讲一个小{animal}的故事。", f"用户想听小{animal}的故事。"),
                (f"讲一个关于{animal}的故事", f"用户想听{animal}的故事。"),
                (f"请讲一个{place}的故事。", f"故事应该在{place}。"),
                (f"请讲一个叫{name}的小{animal}的故事。", f"故事的主角是小{animal}{name}。"),
            )
        )
        return asked, plan, story(random, animal, place, name)
    if roll < 0.6:
        thing, colour = random.choice(COLOUR_OF)
        return f"{thing}是什么颜色？", f"我知道{thing}的颜色。", f"{thing}是{colour}的。"
    if roll < 0.68:
        animal, food = random.choice(ANIMALS)
        return f"{animal}吃什么？", f"问题是{animal}吃什么。", f"{animal}吃{food}。"
    if roll < 0.76:
        a, b = random.randint(0, 5), random.randint(0, 5)
        return (
            f"{DIGITS[a]}加{DIGITS[b]}是多少？",
            f"我来算：{a} + {b} = {a + b}。",
            f"{DIGITS[a]}加{DIGITS[b]}是{DIGITS[a + b]}。",
        )
    names = random.sample(NAMES, 3)
    rows = [
        (name, thing, random.choice(COLOURS), spot)
        for name, thing, spot in zip(names, random.sample(THINGS, 3), random.sample(SPOTS, 3), strict=True)
    ]
    rows = rows[: random.randint(1, 3)]
    text = "".join(f"{name}的{colour}{thing}在{spot}。" for name, thing, colour, spot in rows)
    name, thing, colour, spot = random.choice(rows)
    asked, answer = random.choice(
        (
            (f"{name}的{thing}在哪里？", f"{name}的{thing}在{spot}。"),
            (f"{name}的{thing}是什么颜色？", f"{name}的{thing}是{colour}的。"),
        )
    )
    return text + asked, f"文中说：{name}的{colour}{thing}在{spot}。", answer
