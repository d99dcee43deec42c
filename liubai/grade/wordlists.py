"""Words that the rules of :mod:`liubai.grade.faithful` know: what denies, what limits, opposites, synonyms.

Common words of summaries in any field, written down from general knowledge of the two languages. Left out on
purpose: technical terms, and every pair whose meaning hangs on the field (*sharp*, *short*).
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _groups(text: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(line.split()) for line in text.splitlines() if line.strip())


def _pairs(text: str) -> tuple[tuple[frozenset[str], frozenset[str]], ...]:
    """Of lines ``a b | c d``."""
    sides = (line.partition("|") for line in text.splitlines() if line.strip())
    return tuple((frozenset(a.split()), frozenset(b.split())) for a, _, b in sides)


#: say nothing by themselves; never a claim
FUNCTION = frozenset(
    _words("""
    a an the of to in on at for from by with and or nor so as if than then that this these those which who
    whom whose what when where while it its it's he him his she her hers they them their theirs we us our
    ours you your yours i me my mine is are was were be been being am do does did done doing has have had
    having can could may might must shall should will would also both each every any all some more most
    other others another such there here about into over under up out off through during per via upon
    within between among towards toward across along around because since until whether how why once again
    very too just own same s t d ll re ve m one ones etc include includes including included like well but
    however though although yet still even further moreover furthermore additionally overall thus hence
    therefore respectively namely able how's that's there's
    before after percent cent usd dollar dollars euro euros yuan
    """)
)
#: deny what follows
DENY = frozenset(
    _words("""
    not no never none neither cannot without nobody nothing nowhere lack lacks lacked lacking fail fails
    failed failing unable refuse refuses refused decline declines declined deny denies denied avoid avoids
    avoided prevent prevents prevented
    """)
)
#: leave a part of something out
LIMIT = frozenset(
    _words("""
    only solely merely exclusively except excluding exclude excludes excluded limited restricted unless
    barely hardly rarely seldom few fewer little partial partially partly instead rather
    """)
)
DENY_ZH = frozenset("不没未无非勿别")
LIMIT_ZH = frozenset("只仅唯除")
#: Chinese words in which these signs deny and limit nothing
UNDENIED_ZH = _words("不但 不仅 不过 不断 不同 非常 区别 特别 性别 级别 分别 别人 无论 未来 除了")

#: each side says the contrary of the other
OPPOSITES = _pairs("""
    increase increased increases rise rises rose raise grow grew growth | decrease decreased fall falls fell
    increase increased increases rise rises rose raise grow grew growth | reduce drop drops dropped decline
    gain higher increase raise raised increased | loss lower cut cuts
    more greater larger bigger | less fewer smaller
    high | low
    large big huge | small tiny
    long longer | short shorter brief
    wide broad | narrow
    first | last
    earlier | later
    early | late
    new | old
    begin began start started | end ended finish finished stop stopped
    open opened | close closed
    win won wins | lose lost loses
    buy bought | sell sold
    accept accepted accepts agree agreed agrees | reject rejected rejects refuse refused disagree declines
    allow allows allowed | forbid forbids forbidden prohibit prohibits ban prevent prevents
    easy simple | hard difficult complex
    cheap affordable inexpensive | expensive costly
    fast quick rapid | slow
    good | bad
    best | worst
    better | worse
    improve improves improved enhance | worsen worsens worsened degrade degrades hinder
    strong stronger | weak weaker
    true | false
    right | wrong
    success successful succeed | failure unsuccessful fail
    safe | dangerous unsafe
    free | paid
    public | private
    inside internal indoor | outside external outdoor
    above | below
    north | south
    east | west
    male man men | female woman women
    father | mother
    alive | dead
    positive | negative
    possible | impossible
    likely | unlikely
    always | never
    everyone | nobody
    include includes including | exclude excludes excluding
    with | without
    support supports supported | oppose opposes opposed
    remember | forget
    present | absent
    rich | poor
    hot warm | cold cool
    visual | auditory
    global | local
    online | offline
    maximum | minimum
    upper | lower
    full complete comprehensive | partial incomplete limited
    supervised | unsupervised
    discrete | continuous
    linear | nonlinear
    known | unknown
    common | rare
    temporary | permanent
    voluntary optional | mandatory compulsory required
    accurate | inaccurate
    active | inactive
    adequate | inadequate
    appropriate | inappropriate
    complete | incomplete
    correct | incorrect
    dependent | independent
    direct | indirect
    effective | ineffective
    efficient | inefficient
    expensive | inexpensive
    flexible | inflexible rigid
    formal | informal
    secure | insecure
    sufficient | insufficient
    valid | invalid
    visible | invisible
    perfect | imperfect
    practical | impractical
    optimal | suboptimal
    motivate | demotivate
    well | poorly
    directly | indirectly
    monthly | yearly annual weekly
    day | night
    morning | evening
""")

OPPOSITES_ZH = tuple(
    tuple(pair.split("/"))
    for pair in _words("""
    增长/下降 上升/下降 增加/减少 提高/降低 上涨/下跌 高于/低于 盈利/亏损 赢了/输了 成功/失败 同意/拒绝
    支持/反对 开始/结束 买入/卖出 买下/卖掉 进口/出口 扩大/缩小 加快/放慢 允许/禁止 接受/拒绝
    公开/秘密 最高/最低 最大/最小 首次/再次 之前/之后
    """)
)
#: begin a name; those that begin many other words (高, 方, 文 …) are left out
SURNAMES = frozenset(
    "王李张刘陈杨赵黄周吴徐孙胡朱林郭罗梁宋郑谢韩唐冯董萧程曹袁邓傅沈彭吕苏卢蒋蔡贾丁魏薛阎潘杜戴钟汪姜范姚谭廖邹熊陆郝崔邱秦顾侯邵孟"
)
#: end the name of a place
PLACES = frozenset("省市县区国州镇村")

#: say about the same in a summary
SYNONYMS = _groups("""
    propose suggest recommend present introduce offer put provide give supply deliver extend
    call phone telephone contact reach approach ring
    discuss talk speak conversation converse chat address cover
    show demonstrate reveal display exhibit illustrate indicate express prove find
    explain describe detail clarify outline describes depict
    ask inquire enquire question query request
    say tell state mention note claim report inform announce declare emphasize highlight stress brief
    get obtain acquire receive gain collect gather
    use utilize employ apply leverage
    make create build construct produce develop generate design
    help assist aid support
    want wish desire seek look interest keen
    need require requirement necessity
    method approach technique procedure strategy way framework algorithm scheme
    model network system architecture
    performance result results outcome accuracy
    new novel recent latest newest fresh
    big large wide broad extensive vast comprehensive range
    various several different diverse multiple numerous varied many variety array range assortment selection
    important significant key crucial essential
    quick fast rapid swift
    begin start commence initiate launch
    end finish conclude complete
    buy purchase order
    cost price pricing charge rate fee expense amount
    cheap affordable inexpensive
    expensive costly pricey
    customer client buyer consumer user prospect
    agent representative rep salesperson salesman executive consultant associate advisor
    company firm business organization enterprise corporation
    product item goods offering line service
    plan policy package option scheme bundle program
    email mail message letter correspondence
    information detail specific data
    discount reduction promotion deal saving special
    tailor customize personalize adapt individualize
    potential possible prospective likely
    especially particularly specifically specific particular
    team group staff
    meeting call appointment demo demonstration session
    schedule arrange set plan book
    reply respond answer response
    try attempt
    think believe consider
    agree accept consent
    improve enhance boost better increase optimize strengthen
    reduce decrease lower cut lessen
    increase raise grow boost
    outperform surpass exceed beat better superior
    learn train acquire
    study research investigate examine explore analyze analysis investigation
    paper work article study authors author researchers researcher
    problem issue challenge difficulty task
    achieve attain reach accomplish
    efficient effective efficiency
    allow enable let permit
    compare comparison contrast
    combine integrate merge incorporate
    choose select pick
    remove delete eliminate
    mix combine combination
    child kid children
    film movie
    begin originate
    year annual annually yearly
    month monthly
    week weekly
    day daily
    free complimentary
    home house homeowners
    car auto automobile vehicle automotive
    attach attachment enclose
    sign register enroll subscribe enrolment
    join participate
    contain comprise consist involve feature incorporate encompass
    current present existing ongoing currently presently now
    additional further extra added more
    part component portion
    goal aim objective purpose
    example instance
    type kind sort form
    popular famous known well-known
    country nation
    city town
    job work occupation
""")

MONTHS = dict(
    zip(
        _words("january february march april may june july august september october november december"),
        range(1, 13),
        strict=True,
    )
)
DAYS = frozenset(_words("monday tuesday wednesday thursday friday saturday sunday"))
_UNITS = _words("""
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen
    """)
TENS = _words("twenty thirty forty fifty sixty seventy eighty ninety")
NUMBERS = {word: n for n, word in enumerate(_UNITS)} | {word: 10 * n for n, word in enumerate(TENS, 2)}
_ORDINALS = _words("first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth")
ORDINALS = {word: n for n, word in enumerate(_ORDINALS, 1)}
SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
DIGITS_ZH = {c: n for n, c in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
SCALES_ZH = {"十": 10, "百": 100, "千": 1000, "万": 10**4, "亿": 10**8}
