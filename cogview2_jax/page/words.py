"""The words of the page, in English and Chinese."""

from typing import Any

LANGUAGES = ("en", "zh")

# name → English, Chinese
WORDS = {
    "title": (
        "Pictures from text, editing and captions",
        "文字生成图片、编辑与描述",
    ),
    "generate": ("Generate", "生成"),
    "edit": ("Edit", "编辑"),
    "caption": ("Caption", "描述"),
    "cancel": ("Cancel", "取消"),
    "prompt": ("Text, in English or Chinese", "文字（中文或英文）"),
    "edit_prompt": ("Text of the whole edited picture", "编辑后整张图片的文字"),
    "style": ("Style", "风格"),
    "seed": ("Seed", "随机种子"),
    "seed_info": ("The same seed gives the same pictures", "相同种子得到相同图片"),
    "images": ("Pictures", "图片数量"),
    "candidates": ("Candidates for each", "每张的候选数"),
    "candidates_info": (
        "Each picture is the best of so many",
        "从这么多候选中选出最好的一张",
    ),
    "more": ("Seed and candidates", "种子与候选"),
    "more_of_edit": ("Seed and number", "种子与数量"),
    "pictures": ("Pictures", "图片"),
    "making": ("How the chosen picture came to be", "所选图片的生成过程"),
    "confidence": (
        "How sure the model was of each token, at the base stage and the next: yellow is sure",
        "模型对每个图像标记的把握（基础阶段与下一阶段）：黄色表示有把握",
    ),
    "best": ("Pick the best", "选出最好的"),
    "edit_this": ("Edit this picture", "编辑这张图片"),
    "download": ("Download with settings", "下载图片与设置"),
    "load": ("Load settings", "载入设置"),
    "upload": ("Choose a picture", "选择图片"),
    "draw": (
        "What to redraw: drag on the picture",
        "要重画的部分：在图片上拖动",
    ),
    "tool": ("Draw with", "工具"),
    "box": ("box", "方框"),
    "brush": ("brush", "画笔"),
    "erase": ("Clear", "清除"),
    "numbers": ("Or the box in numbers", "或用数字给出方框"),
    "numbers_info": (
        "top, left, bottom, right as parts of the picture: 0.5, 0, 1, 1 is the lower half",
        "上、左、下、右，占图片的比例：0.5, 0, 1, 1 是下半部分",
    ),
    "compare": ("Before and after", "编辑前后"),
    "results": ("Results", "结果"),
    "caption_language": ("Language", "语言"),
    "its_caption": ("Caption", "描述"),
    "english": ("English", "英文"),
    "chinese": ("Chinese", "中文"),
    # Progress
    "working": ("Drawing the base picture …", "正在生成基础图片……"),
    "candidate": ("Drawing the base picture …", "正在生成基础图片……"),
    "base": ("Base picture drawn; super-resolution …", "基础图片完成；正在超分辨率……"),
    "direct": ("Direct super-resolution done; refining …", "直接超分辨率完成；正在细化……"),
    "round": ("Refined: round {number} of {rounds}", "细化：第 {number} 轮，共 {rounds} 轮"),
    "done": ("Done in {seconds:.1f} s", "完成，用时 {seconds:.1f} 秒"),
    "editing": ("Editing …", "正在编辑……"),
    "captioning": ("Reading the picture …", "正在识别图片……"),
    "cancelled": ("Cancelled", "已取消"),
    "ranked": ("Best first, with their scores", "按得分从高到低排列"),
    "loaded": ("Settings loaded", "设置已载入"),
    # What is wrong
    "no_text": ("Write a text first", "请先输入文字"),
    "long_text": (
        "The text has {length:,} characters: at most {most:,} are allowed",
        "文字有 {length:,} 个字符：最多 {most:,} 个",
    ),
    "range": (
        "{what} must be a whole number from {low} to {high}",
        "{what}必须是 {low} 到 {high} 的整数",
    ),
    "no_picture": ("Choose a picture first", "请先选择图片"),
    "bad_picture": ("This file cannot be used: {reason}", "无法使用此文件：{reason}"),
    "large_file": (
        "The file has {size:.0f} MiB: at most {most:.0f} are allowed",
        "文件有 {size:.0f} MiB：最多 {most:.0f} MiB",
    ),
    "no_part": (
        "Draw on the picture what to redraw, or give the box in numbers",
        "请在图片上画出要重画的部分，或用数字给出方框",
    ),
    "bad_part": (
        "The box must be four numbers from 0 to 1: top, left, bottom, right",
        "方框必须是四个 0 到 1 之间的数：上、左、下、右",
    ),
    "much_drawn": ("Too much is drawn: clear it and draw less", "画得太多：请清除后少画一些"),
    "no_pictures": ("Generate pictures first", "请先生成图片"),
    "no_settings": (
        "This file has no settings of this page: choose a picture or a settings.json from it",
        "此文件没有本页的设置：请选择由本页下载的图片或 settings.json",
    ),
    "refused": ("{reason}", "无法完成：{reason}"),
}


def table(language: str) -> dict[str, str]:
    """All words of a language, "en" or "zh"."""
    column = LANGUAGES.index(language)
    return {name: both[column] for name, both in WORDS.items()}


def say(name: str, language: str, **values: Any) -> str:
    return table(language)[name].format(**values)


def language_of(accepted: str | None) -> str:
    """The page's language for a browser's Accept-Language: of Chinese and English the first."""
    for part in (accepted or "").lower().split(","):
        for language in LANGUAGES:
            if part.strip().startswith(language):
                return language
    return LANGUAGES[0]
