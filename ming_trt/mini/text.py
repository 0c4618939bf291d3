"""A few sentences in English and Chinese from which the small tokenizer learns its merges."""

TEXT = """\
The lighthouse keeper wrote down the weather every morning before the boats went out.
A small red bird sat on the fence and watched the gardener turn the wet soil.
What is in this picture? There are three people, two dogs and a long wooden table under an old tree.
Please describe the sound that you hear: rain on the roof, a distant train, somebody laughing in the kitchen.
How many apples are left if we eat two of them today and give one to our neighbour tomorrow?
The answer is five, because seven minus two is five, and nobody came to take the last one.
The river runs through the middle of the town, past the market, the school and the two bridges.
She opened the window, looked at the mountains and said that snow would come before the evening.
First boil the water, then add the rice, the salt and a little oil, and wait for twenty minutes.
The video shows a man who walks along the beach, stops, picks up a shell and throws it into the sea.
My grandmother knew the names of all the stars that can be seen from the northern fields in winter.
If the light is green you may go; if it is red you must wait until the others have crossed the street.
The music began softly with a single flute, and then the drums and the strings joined it one by one.
A good question is worth more than a quick answer, and a quiet room is worth more than both.
The computer reads the words, turns them into numbers, and the numbers become new words again.
Write a short story about a clock that was always late and a girl who was always early.
The old map had no roads on it, only hills, forests and a line of blue ink for the water.
I would like a cup of tea with milk, two slices of bread, and the newspaper from yesterday.
We measured the length of the wall, the height of the door and the width of every window in the house.
Today the sky is clear, the wind is light, and the harvest can begin as soon as the machine is repaired.
Can you tell me where the station is? Yes, go straight on, turn left at the bank and walk for five minutes.
The child drew a yellow sun, a brown horse, a house with smoke above the chimney and a very large cat.
They spoke about the price of coffee, the new teacher and the football match of last Saturday.
Because the bridge was closed, the driver took the other road and arrived one hour later than planned.
Nothing is as useful as a sharp pencil when an idea comes in the middle of the night.
The glass is half full, the bottle is empty, and the plate is on the shelf near the yellow lamp.
In the picture you can see a white boat with a blue sail near a green island.
The speaker sounds happy and a little tired, and talks about a journey through the desert.
Step by step: read the problem, write what you know, find what is missing, and then calculate.
Thank you for your help; the problem is solved and the machine works again without any noise.
今天早上天气很好,阳光照在窗前的花上。
图片里有一只白色的小猫,坐在红色的椅子旁边。
请问火车站怎么走?一直往前走,到银行左转,再走五分钟就到了。
我们一起去河边看日落,风很轻,水很清。
老师问了一个问题,学生们想了很久才回答。
这个视频里有三个人在海边走路,其中一个人拿着一把蓝色的伞。
他每天晚上都会读一本书,然后写下自己的想法。
先把水烧开,再放米和一点盐,等二十分钟就可以吃饭了。
声音听起来很高兴,好像在说一个很有趣的故事。
如果今天吃两个苹果,明天送给邻居一个,还剩几个?
答案是五个,因为七减二等于五。
城市的中间有一条大河,河上有两座桥,桥边是学校和市场。
奶奶知道冬天夜里所有星星的名字。
电脑把文字变成数字,又把数字变成新的文字。
请写一个短故事,说一说迟到的钟和早到的女孩。
山上下雪了,孩子们在院子里堆雪人。
谢谢你的帮助,问题已经解决了,机器又可以工作了。
我想喝一杯热茶,吃两片面包,看昨天的报纸。
音乐开始的时候很安静,后来鼓和琴一起响起来。
路上的灯是绿色的时候可以走,红色的时候要等一等。
"""
